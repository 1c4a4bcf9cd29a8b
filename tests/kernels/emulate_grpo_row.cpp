// csrc/cuda/logits_grpo_loss.cu with threads, shared and distributed shared memory replaced by
// loops and arrays, in the same order. Compiled and called by test_logits_grpo_loss_cuda.py.
#include <algorithm>
#include <vector>

#include "../../csrc/cuda/grpo_row.h"

namespace {

using namespace r1v3;
using namespace r1v3::grpo;

struct Block {
  Split split;
  std::vector<Vector> shared;
  std::vector<Slice> slices;   // per thread
  std::vector<float> loose;    // per thread
  State state;
};

// Counts accesses, so that a byte that is read or written twice, or not at all, shows.
struct Traffic {
  int32_t* reads;
  int32_t* writes;
  bool misplaced = false;
};

State merge_lanes(std::vector<State> states, float scale) {
  for (size_t offset = states.size() / 2; offset > 0; offset /= 2) {
    for (size_t lane = 0; lane + offset < states.size(); ++lane) {
      states[lane] = merge(states[lane], states[lane + offset], scale);
    }
  }
  return states[0];
}

template <typename T>
void load(Block& block, const T* in, int64_t vocab, const Token& token, int rank, int blocks,
          Traffic& traffic) {
  block.split = split_row<T>(reinterpret_cast<uintptr_t>(in), vocab, blocks);
  block.shared.resize(block.split.per_block);
  block.loose.assign(kThreads, 0.0f);
  for (int thread = 0; thread < kThreads; ++thread) {
    const Slice slice = slice_of<T>(block.split, token.label, rank, blocks, thread);
    block.slices.push_back(slice);
    const T* from = in + slice.column;
    if (slice.count > 0 && reinterpret_cast<uintptr_t>(from) % kVectorBytes != 0) {
      traffic.misplaced = true;
    }
    for (int step = 0; step < group_begin(slice.steps, kGroups); ++step) {
      const int v = step * kThreads + thread;
      if (v >= slice.count) continue;
      std::memcpy(&block.shared[v], from + v * kLanes<T>, kVectorBytes);
      for (int i = 0; i < kLanes<T>; ++i) ++traffic.reads[slice.column + v * kLanes<T> + i];
    }
    if (slice.loose >= 0) {
      block.loose[thread] = to_float(in[slice.loose]);
      ++traffic.reads[slice.loose];
    }
  }
}

template <typename T>
void reduce(Block& block, float scale) {
  std::vector<State> warps;
  std::vector<State> lane_states;
  for (int thread = 0; thread < kThreads; ++thread) {
    const Slice& slice = block.slices[thread];
    State state = empty_state();
    if (slice.loose >= 0) {
      const float x[1] = {block.loose[thread]};
      accumulate(state, x, scale);
    }
    for (int group = 0; group < kGroups; ++group) {
      for (int step = group_begin(slice.steps, group); step < group_begin(slice.steps, group + 1);
           ++step) {
        const int v = step * kThreads + thread;
        if (v >= slice.count) break;
        float x[kLanes<T>];
        unpack<T>(block.shared[v], x);
        accumulate(state, x, scale);
      }
    }
    if (slice.loose_token) state.t = block.loose[thread];
    if (slice.token_vector >= 0 && slice.token_vector % kThreads == thread) {
      const T* vector = reinterpret_cast<const T*>(&block.shared[slice.token_vector]);
      state.t = to_float(vector[slice.token_lane]);
    }
    lane_states.push_back(state);
    if (thread % 32 == 31) {
      warps.push_back(merge_lanes(lane_states, scale));
      lane_states.clear();
    }
  }
  block.state = merge_lanes(warps, scale);
}

template <typename T>
void write(const Block& block, T* out, const Result& result, float scale, Traffic& traffic) {
  for (int thread = 0; thread < kThreads; ++thread) {
    const Slice& slice = block.slices[thread];
    if (slice.loose >= 0) {
      const float x = block.loose[thread];
      const float value =
          result.pull == 0.0f ? 0.0f : gradient(x, result, scale, slice.loose_token);
      out[slice.loose] = from_float<T>(value);
      ++traffic.writes[slice.loose];
    }
    for (int v = thread; v < slice.count; v += kThreads) {
      float x[kLanes<T>];
      unpack<T>(block.shared[v], x);
      gradient(x, result, scale, v == slice.token_vector ? slice.token_lane : -1);
      const Vector packed = pack<T>(x);
      std::memcpy(out + slice.column + v * kLanes<T>, &packed, kVectorBytes);
      for (int i = 0; i < kLanes<T>; ++i) ++traffic.writes[slice.column + v * kLanes<T> + i];
    }
  }
}

template <typename T>
Result row(const T* in, T* out, int64_t vocab, int blocks, const Token& token,
           const TokenOptions& options, Traffic& traffic) {
  const float scale = scale_of(token.temperature);
  std::vector<Block> cluster(blocks);
  for (int rank = 0; rank < blocks; ++rank) {
    load(cluster[rank], in, vocab, token, rank, blocks, traffic);
    reduce<T>(cluster[rank], scale);
  }
  State state = cluster[0].state;
  for (int rank = 1; rank < blocks; ++rank) state = merge(state, cluster[rank].state, scale);
  const Result result = finish(state, token, vocab, options);
  for (int rank = 0; rank < blocks; ++rank) write(cluster[rank], out, result, scale, traffic);
  return result;
}

}  // namespace

// dtype 0 float32, 1 bfloat16; in may be out; reads and writes are [vocab] counters.
// token: loss scale, old log-probability, advantage, weight, reference log-probability.
// options: the eight of GrpoOptions.
// Returns false when a 16-byte access would have been unaligned.
extern "C" bool emulate(int dtype, const void* in, void* out, int64_t vocab, int blocks,
                        int64_t label, const float* token, bool has_old, bool has_ref,
                        float temperature, const double* options, int32_t* reads, int32_t* writes,
                        float* logprob_and_entropy) {
  const Token known = {label,    temperature, token[0], token[1], token[2],
                       token[3], token[4],    has_old,  has_ref};
  const TokenOptions chosen = single_precision(grpo_options({options, options + 8}));
  Traffic traffic = {reads, writes};
  const auto run = [&](auto kind) {
    using T = decltype(kind);
    return row(static_cast<const T*>(in), static_cast<T*>(out), vocab, blocks, known,
               chosen, traffic);
  };
  const Result result = dtype == 0 ? run(0.0f) : run(bf16{});
  logprob_and_entropy[0] = result.logprob;
  logprob_and_entropy[1] = result.entropy;
  return !traffic.misplaced;
}
