// Which instruction sets this machine can run.
#pragma once

#include <string>
#include <vector>

#include "rows.h"

namespace r1v3 {

// Best first; "portable" is always last.
std::vector<std::string> cpu_capabilities();

// The kernels for `capability`, or the best ones for "". Throws std::invalid_argument for a
// name that this machine cannot run.
const Kernels& kernels_for(const std::string& capability);

}  // namespace r1v3
