// Threads for loops over independent items.
#pragma once

#include <cstdint>
#include <functional>

namespace r1v3 {

// Calls body(i) once for every i in [0, n) on at most num_threads threads, the calling one included.
// `cost` is the work of one item in logits; small loops stay on the calling thread.
//
// Threads live for one call. There is no pool that could deadlock in a forked child, as GNU OpenMP's
// does, and none that would compete with torch's own; starting a thread takes some 20 us, which the
// minimum work per thread keeps small. One that the system has not started when the work is done is
// not waited for. body must not throw.
void parallel_for(int64_t n, int64_t cost, int num_threads,
                  const std::function<void(int64_t)>& body);

}  // namespace r1v3
