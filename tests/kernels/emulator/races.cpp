// Every access of the kernel, and whether barriers order those that need an order.
//
// The kernel's source is compiled with -fsanitize=thread, which calls a function before every load
// and store; the functions are here, ThreadSanitizer itself is not used. An access of thread a
// comes before one of thread b only if, since, b has passed a barrier of their block, or of their
// cluster, that a arrived at. Shuffles order nothing, clusters are never ordered.
#include <algorithm>
#include <memory>
#include <unordered_map>

#include "grid.h"

namespace emulator {

uint64_t accesses_checked = 0;

namespace {

constexpr uintptr_t kUnit = 2;  // bytes: one bfloat16
constexpr uintptr_t kPage = 4096 / kUnit;

struct Access {
  uint32_t thread = 0;  // 0: none
  uint16_t block_barriers = 0, cluster_barriers = 0;
};

struct Unit {
  Access write, read[2];
  uint8_t reads = 0, writes = 0;
};

std::unordered_map<uintptr_t, std::unique_ptr<Unit[]>> pages;

Unit& unit_at(uintptr_t unit) {
  static uintptr_t last = ~uintptr_t{0};
  static Unit* page = nullptr;
  if (pages.empty() || last != unit / kPage) {
    last = unit / kPage;
    auto& found = pages[last];
    if (!found) found.reset(new Unit[kPage]);
    page = found.get();
  }
  return page[unit % kPage];
}

uint32_t block_of(uint32_t thread) { return (thread - 1) / launch.threads_per_block; }

bool ordered(const Access& before, const Access& now) {
  if (before.thread == 0 || before.thread == now.thread) return true;
  const uint32_t a = block_of(before.thread), b = block_of(now.thread);
  if (a / launch.blocks_per_cluster != b / launch.blocks_per_cluster) return false;
  if (a == b && now.block_barriers > before.block_barriers) return true;
  return now.cluster_barriers > before.cluster_barriers;
}

[[noreturn]] void report(const char* what, const Access& before, const void* address) {
  fail(std::string("race: ") + what + " in " + describe(address) + ", after thread " +
       std::to_string((before.thread - 1) % launch.threads_per_block) + " of block " +
       std::to_string(block_of(before.thread)) + " without a barrier");
}

void note(Unit& unit, const Access& now, bool writes, const void* address) {
  if (!ordered(unit.write, now)) report(writes ? "two writes" : "a read of a write", unit.write, address);
  uint8_t& count = writes ? unit.writes : unit.reads;
  count = static_cast<uint8_t>(std::min(count + 1, 255));
  if (writes) {
    for (const Access& read : unit.read) {
      if (!ordered(read, now)) report("a write of what was read", read, address);
    }
    unit.write = now;
    unit.read[0] = unit.read[1] = {};
  } else if (unit.read[0].thread == now.thread || ordered(unit.read[0], now)) {
    unit.read[0] = now;
  } else {
    unit.read[1] = now;  // two readers without an order are enough: a later write has one of them
  }
}

bool is_on_stack(const char* address) {
  const char* stack = running->stack.get();
  return address >= stack && address < stack + (1 << 16);
}

}  // namespace

void note_access(const void* address, size_t bytes, bool writes) {
  if (running == nullptr || is_on_stack(static_cast<const char*>(address))) return;
  ++accesses_checked;
  const Access now = {running->number, running->block_barriers, running->cluster_barriers};
  const auto begin = reinterpret_cast<uintptr_t>(address) / kUnit;
  const auto end = (reinterpret_cast<uintptr_t>(address) + bytes + kUnit - 1) / kUnit;
  for (uintptr_t unit = begin; unit < end; ++unit) note(unit_at(unit), now, writes, address);
}

void forget_accesses() { pages.clear(); }

// Whose shared memory has these addresses next starts anew.
void forget_accesses(const void* from, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(from) / kUnit;
  for (uintptr_t unit = begin; unit < begin + (bytes + kUnit - 1) / kUnit; ++unit) unit_at(unit) = {};
}

void count_accesses(const void* from, size_t units, uint8_t* reads, uint8_t* writes) {
  const auto begin = reinterpret_cast<uintptr_t>(from) / kUnit;
  for (size_t i = 0; i < units; ++i) {
    const Unit& unit = unit_at(begin + i);
    reads[i] = unit.reads;
    writes[i] = unit.writes;
  }
}

}  // namespace emulator

#define ACCESSES(bytes)                                                                       \
  void __tsan_read##bytes(void* at) { emulator::note_access(at, bytes, false); }              \
  void __tsan_write##bytes(void* at) { emulator::note_access(at, bytes, true); }              \
  void __tsan_unaligned_read##bytes(void* at) { emulator::note_access(at, bytes, false); }    \
  void __tsan_unaligned_write##bytes(void* at) { emulator::note_access(at, bytes, true); }

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* at, size_t bytes) { emulator::note_access(at, bytes, false); }
void __tsan_write_range(void* at, size_t bytes) { emulator::note_access(at, bytes, true); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
