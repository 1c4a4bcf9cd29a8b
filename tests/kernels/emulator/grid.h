// A launch under way: its threads, blocks and clusters.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulator {

constexpr int kWarp = 32;

struct Block;
struct Cluster;

struct Copy {
  void* to;
  const void* from;
  uint32_t data[4];
  bool early;  // the source was read when the copy was asked for, not when it landed
};

struct Thread {
  Block* block;
  unsigned index;   // in its block
  uint32_t number;  // in the launch, from 1
  std::unique_ptr<char[]> stack;
  jmp_buf context;
  bool started = false, done = false;
  // Barriers passed, by which accesses to memory are ordered.
  uint16_t block_barriers = 0, cluster_barriers = 0;
  bool announced = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

// Threads that wait for each other.
struct Barrier {
  unsigned arrived = 0;
  std::vector<Thread*> waiting;
};

struct Warp {
  unsigned arrived = 0;
  uint64_t phase = 0;
  uint32_t bits[2][kWarp];
  std::vector<Thread*> waiting;
};

struct Block {
  Cluster* cluster;
  unsigned index, rank;
  unsigned threads, alive;
  bool started = false;
  char* shared = nullptr;
  size_t shared_bytes = 0, mapped_bytes = 0;
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  unsigned alive = 0;
  unsigned announced = 0;
  std::vector<Thread*> waiting_for_start;
  Barrier barrier;
};

// What a test chooses.
struct Settings {
  uint64_t seed = 0;
  unsigned clusters = 1;  // that are resident at once
  std::string without;    // a primitive that does nothing: a fault that must be noticed
};

struct Launch {
  Settings settings;
  std::mt19937_64 random;
  unsigned threads_per_block = 0, blocks_per_cluster = 0;
  size_t shared_bytes = 0;
  std::function<void()> kernel;
  std::vector<std::unique_ptr<Cluster>> resident;
  std::vector<Thread*> ready;
  std::vector<Thread*> late;  // of a block that starts only when nothing else can run
  std::string failure;
};

extern Launch launch;
extern Thread* running;

// fibers.cpp: threads that run one at a time, until they wait.
void resume(Thread& thread);
void suspend();
void let_others_run();
void wake(std::vector<Thread*>& waiting);
[[noreturn]] void fail(const std::string& what);

// shared_memory.cpp: pages of a block that nobody may touch before it starts or after it ends.
void map_shared_memory(Block& block);
void open_shared_memory(Block& block);
void close_shared_memory(Block& block);
void unmap_shared_memory(Block& block);
std::string describe(const void* address);

// races.cpp: accesses that no barrier orders.
void forget_accesses();
void forget_accesses(const void* from, size_t bytes);
void note_access(const void* address, size_t bytes, bool writes);
void count_accesses(const void* from, size_t units, uint8_t* reads, uint8_t* writes);
extern uint64_t accesses_checked;

inline bool is_missing(const char* primitive) { return launch.settings.without == primitive; }

}  // namespace emulator
