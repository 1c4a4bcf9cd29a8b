// A Python module with the CUDA kernel's functions of r1v3._C, on the emulated device.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>

#include <string>

#include "csrc/cuda/bindings.h"
#include "grid.h"
#include "runtime.h"

namespace py = pybind11;

PYBIND11_MODULE(emulated, m) {
  r1v3::define_cuda(m);
  m.attr("built_with_cuda") = true;
  m.def(
      "configure",
      [](uint64_t seed, unsigned clusters, const std::string& without) {
        emulator::launch.settings = {seed, clusters, without};
      },
      py::arg("seed"), py::arg("clusters") = 1, py::arg("without") = "");
  m.def("accesses_checked", [] { return emulator::accesses_checked; });
  m.def("last_shared_bytes", [] { return emulator::last_shared_bytes; });
  m.def("interrupt_by", [](std::function<void()> other) { emulator::another_host_thread = other; });
  m.def(
      "count_accesses",
      [](uintptr_t from, size_t units, uintptr_t reads, uintptr_t writes) {
        emulator::count_accesses(reinterpret_cast<void*>(from), units,
                                 reinterpret_cast<uint8_t*>(reads),
                                 reinterpret_cast<uint8_t*>(writes));
      },
      "How often the last launch read and wrote each two bytes from an address on.");
}
