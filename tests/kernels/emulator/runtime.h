// What lies between the runtime, the kernel's source and a test.
#pragma once

#include <cstddef>
#include <functional>

namespace emulator {

// kernel.cpp: run one thread of a kernel, as cudaLaunchKernelExC names it.
void call_kernel(const void* kernel, void** parameters);

// Runs once, between two calls of the next launch or preparation.
extern std::function<void()> another_host_thread;
extern size_t last_shared_bytes;  // of the last launch

}  // namespace emulator
