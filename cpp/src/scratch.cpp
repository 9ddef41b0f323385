#include "scratch.h"

namespace ktt {
namespace {

void grow(Buffer& buffer, size_t num_bytes, int numa_node) {
  if (buffer.size() < num_bytes) buffer = Buffer(num_bytes, numa_node);
}

void grow(std::vector<const void*>& rows, size_t size) {
  if (rows.size() < size) rows.resize(size);
}

}  // namespace

Scratch::Scratch(const Pool& pool) : counts(pool.num_parts()), parts(pool.num_parts()) {
  for (size_t i = 0; i < pool.num_threads(); ++i) workers.push_back(std::make_unique<Worker>());
}

void Scratch::reserve(const Pool& pool, const Need& need) {
  grouping.reserve(need.num_experts, need.num_positions);
  grow(input_rows, need.num_positions);
  grow(operands, need.operand_bytes, -1);
  grow(gathered, need.gathered_bytes, -1);
  for (size_t i = 0; i < parts.size(); ++i) {
    grow(parts[i].down_rows, need.num_positions);
    grow(parts[i].activation, need.activation_bytes[i], pool.memory_node(i));
    grow(parts[i].totals, need.totals_bytes, pool.memory_node(i));
  }
}

}  // namespace ktt
