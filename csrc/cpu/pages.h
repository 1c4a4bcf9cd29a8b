// Memory that is about to be written for the first time.
#pragma once

#include <cstdint>

namespace r1v3 {

// Asks for huge pages under [data, data + bytes): a fresh gradient of the logits costs the kernel of
// the operating system a page fault per 4 KiB otherwise, which takes longer than the arithmetic.
// Does nothing where the system does not know them; pages that exist stay as they are.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace r1v3
