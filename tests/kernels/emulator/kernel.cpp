// The kernel's source as it is.
#include "csrc/cuda/logits_grpo_loss.cu"

#include "runtime.h"

namespace emulator {

void call_kernel(const void* kernel, void** parameters) {
  const auto& arguments = *static_cast<r1v3::Arguments*>(parameters[0]);
  if (kernel == r1v3::kernel_of(0)) {
    r1v3::logits_grpo_loss_kernel<float>(arguments);
  } else {
    r1v3::logits_grpo_loss_kernel<r1v3::grpo::bf16>(arguments);
  }
}

}  // namespace emulator
