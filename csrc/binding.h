// What the functions of the module share. Tensors arrive as addresses, so that it does not depend on
// a torch version. Address 0 = absent.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace r1v3::binding {

namespace py = pybind11;

using Address = uintptr_t;
using WithoutGil = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline void require(bool ok, const std::string& name, double value, const char* right) {
  if (!ok) {
    throw std::invalid_argument(name + " must be " + right + ", got " + std::to_string(value));
  }
}

}  // namespace r1v3::binding
