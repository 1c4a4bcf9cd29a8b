// Nothing: the kernel, which uses it, is empty for the host's compiler.
#pragma once
namespace cooperative_groups {}
