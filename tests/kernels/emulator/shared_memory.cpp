// Shared memory of blocks, which is not there before they start or after they end, and copies to it.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "cuda_runtime.h"
#include "grid.h"

namespace emulator {

// A block sees NaN before it has written anything. The memory ends at a page nobody may touch.
void map_shared_memory(Block& block) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t pages = (launch.shared_bytes + page - 1) / page * page;
  block.mapped_bytes = pages + 2 * page;
  void* memory =
      mmap(nullptr, block.mapped_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for a block");
  block.shared_bytes = launch.shared_bytes;
  block.shared = static_cast<char*>(memory) + page + (pages - launch.shared_bytes);
}

void open_shared_memory(Block& block) {
  if (block.started) return;
  block.started = true;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  char* end = block.shared + block.shared_bytes;
  char* begin = end - (block.mapped_bytes - 2 * page);
  mprotect(begin, static_cast<size_t>(end - begin), PROT_READ | PROT_WRITE);
  std::memset(begin, 0xff, static_cast<size_t>(end - begin));
}

void close_shared_memory(Block& block) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t bytes = block.mapped_bytes - 2 * page;
  mprotect(block.shared + block.shared_bytes - bytes, bytes, PROT_NONE);
}

void unmap_shared_memory(Block& block) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  forget_accesses(block.shared, block.shared_bytes);
  munmap(block.shared + block.shared_bytes + page - block.mapped_bytes, block.mapped_bytes);
}

std::string describe(const void* address) {
  for (const auto& cluster : launch.resident) {
    for (const auto& block : cluster->blocks) {
      const char* begin = block->shared;
      if (address < begin - 4096 || address >= begin + block->shared_bytes + 4096) continue;
      const char* state = !block->started ? "which has not started"
                          : block->alive == 0 ? "which has ended" : "or just beside it";
      return "shared memory of block " + std::to_string(block->index) + ", " + state;
    }
  }
  return "memory that is not shared memory";
}

void* shared_memory() { return running->block->shared; }

void* in_block(void* own, int rank) {
  Block& block = *running->block;
  const ptrdiff_t offset = static_cast<char*>(own) - block.shared;
  if (rank < 0 || rank >= static_cast<int>(block.cluster->blocks.size())) {
    fail("shared memory of a block that the cluster does not have");
  }
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(block.shared_bytes)) {
    fail("shared memory of another block, through an address that is not shared memory");
  }
  return block.cluster->blocks[static_cast<size_t>(rank)]->shared + offset;
}

void wait_for_copies(int pending) {
  if (is_missing("wait_for_copies")) return;
  if (launch.random() % 4 == 0) let_others_run();
  auto& groups = running->committed;
  while (static_cast<int>(groups.size()) > pending) {
    std::shuffle(groups.front().begin(), groups.front().end(), launch.random);
    for (Copy& copy : groups.front()) {
      if (!copy.early) {
        note_access(copy.from, sizeof copy.data, false);
        std::memcpy(copy.data, copy.from, sizeof copy.data);
      }
      note_access(copy.to, sizeof copy.data, true);
      std::memcpy(copy.to, copy.data, sizeof copy.data);
    }
    groups.pop_front();
  }
}

}  // namespace emulator

using namespace emulator;

void __stcs(uint4* to, uint4 value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof value != 0) fail("an unaligned store of 16 bytes");
  note_access(to, sizeof value, true);
  *to = value;
}

namespace r1v3::grpo {

// Until it is waited for, a copy's destination holds NaN; its source is read now or then.
void copy_vector(Vector* to, const void* from, uint64_t) {
  const Block& block = *running->block;
  const char* at = reinterpret_cast<char*>(to);
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Vector) != 0 ||
      reinterpret_cast<uintptr_t>(from) % sizeof(Vector) != 0) {
    fail("an unaligned copy of 16 bytes");
  }
  if (at < block.shared || at + sizeof(Vector) > block.shared + block.shared_bytes) {
    fail("a copy to other than shared memory");
  }
  Copy copy = {to, from, {}, launch.random() % 2 == 0};
  if (copy.early) {
    note_access(from, sizeof copy.data, false);
    std::memcpy(copy.data, from, sizeof copy.data);
  }
  note_access(to, sizeof copy.data, true);
  std::memset(static_cast<void*>(to), 0xff, sizeof copy.data);
  running->open.push_back(copy);
}

void commit_copies() {
  running->committed.push_back(std::move(running->open));
  running->open.clear();
}

}  // namespace r1v3::grpo
