#include "scratch.h"

#include <algorithm>

namespace ktt {
namespace {

constexpr size_t kSumsBytes = kMaxPanels * kMaxRows * kPanelColumns * sizeof(float);

void grow(Buffer& buffer, size_t num_bytes, int numa_node) {
  if (buffer.size() < num_bytes) buffer = Buffer(num_bytes, numa_node);
}

}  // namespace

Scratch::Scratch(const Pool& pool)
    : counts(pool.num_parts()), parts(pool.num_parts()), pool_(pool) {
  for (size_t i = 0; i < pool.num_threads(); ++i) workers.push_back(std::make_unique<Worker>());
}

void Scratch::reserve(const Need& need) {
  grouping.reserve(need.num_experts, need.num_choices);
  grow(operands, need.operand_bytes, -1);
  grow(gathered, need.gathered_bytes, -1);
  const size_t num_chunks = Grouping::max_chunks(need.num_experts, need.num_choices);
  for (size_t i = 0; i < parts.size(); ++i) {
    const PartNeed& part = need.parts[i];
    parts[i].tasks.reserve(part.num_tasks);
    if (num_chunks_ < num_chunks) {
      parts[i].open_panels = std::make_unique<std::atomic<uint32_t>[]>(num_chunks);
    }
    if (num_output_panels_ < need.num_output_panels) {
      parts[i].open_chunks = std::make_unique<std::atomic<uint32_t>[]>(need.num_output_panels);
    }
    grow(parts[i].values, part.values_bytes, pool_.memory_node(i));
    grow(parts[i].activation, part.activation_bytes, pool_.memory_node(i));
    grow(parts[i].products, part.product_bytes, pool_.memory_node(i));
    grow(parts[i].totals, part.totals_bytes, pool_.memory_node(i));
  }
  num_chunks_ = std::max(num_chunks_, num_chunks);
  num_output_panels_ = std::max(num_output_panels_, need.num_output_panels);
  for (size_t i = 0; i < workers.size(); ++i) reserve_worker(i, need.worker_totals_bytes);
}

void Scratch::reserve_worker(size_t worker, size_t totals_bytes) {
  Worker& w = *workers[worker];
  grow(w.memory, kSumsBytes + kDecodeBytes + totals_bytes,
       pool_.memory_node(pool_.part_of(worker)));
  w.sums = w.memory.as<float>();
  w.decode = w.memory.data() + kSumsBytes;
  w.totals = reinterpret_cast<float*>(w.decode + kDecodeBytes);
}

}  // namespace ktt
