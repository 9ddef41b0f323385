#include "grouping.h"

#include <algorithm>
#include <functional>
#include <string>

#include "error.h"
#include "kernels/kernel_table.h"
#include "memory.h"

namespace ktt {
namespace {

// Chunks are whole blocks of tile kernels, but for an expert's last one.
constexpr size_t kRowBlock = 16;
static_assert(kMaxRows % kRowBlock == 0);

template <class T>
void grow(std::vector<T>& values, size_t size) {
  if (values.size() < size) values.resize(size);
}

void check_id(const Choices& choices, size_t i, const std::vector<bool>& is_set) {
  const int32_t id = choices.ids[i];
  const bool exists = id >= 0 && static_cast<size_t>(id) < is_set.size();
  if (exists && is_set[static_cast<size_t>(id)]) return;
  const std::string where = "ids[" + std::to_string(i / choices.top_k) + "][" +
                            std::to_string(i % choices.top_k) + "] = " + std::to_string(id);
  throw Error(ErrorCode::kInvalidArgument,
              where + (exists ? ", but that expert has no weights here; set them first or pass -1"
                              : ", but experts go from 0 to " + std::to_string(is_set.size() - 1) +
                                    "; -1 marks one that lives elsewhere"));
}

}  // namespace

size_t Grouping::max_chunks(size_t num_experts, size_t num_choices) {
  return std::min(num_experts, num_choices) + num_choices / kMaxRows;
}

void Grouping::reserve(size_t num_experts, size_t num_choices) {
  grow(first_, num_experts + 1);
  grow(next_, num_experts);
  grow(token_of_, num_choices);
  grow(weight_of_, num_choices);
  grow(position_of_, num_choices);
  active_.reserve(num_experts);
  by_load_.reserve(num_experts);
  chunks_.reserve(max_chunks(num_experts, num_choices));
}

void Grouping::group(const Choices& choices, const std::vector<bool>& is_set) {
  count(choices, is_set);
  find_active(is_set.size());
  deal(choices);
  cut();
}

// Positions per expert into first_[expert + 1].
void Grouping::count(const Choices& choices, const std::vector<bool>& is_set) {
  std::fill_n(first_.begin(), is_set.size() + 1, 0u);
  for (size_t i = 0; i < choices.num_tokens * choices.top_k; ++i) {
    if (choices.ids[i] == -1) continue;
    check_id(choices, i, is_set);
    ++first_[static_cast<size_t>(choices.ids[i]) + 1];
  }
}

void Grouping::find_active(size_t num_experts) {
  active_.clear();
  for (size_t e = 0; e < num_experts; ++e) {
    next_[e] = first_[e];
    if (first_[e + 1] > 0) active_.push_back(static_cast<uint32_t>(e));
    first_[e + 1] += first_[e];
  }
}

void Grouping::deal(const Choices& choices) {
  for (size_t token = 0, i = 0; token < choices.num_tokens; ++token) {
    for (size_t k = 0; k < choices.top_k; ++k, ++i) {
      position_of_[i] = kNowhere;
      if (choices.ids[i] == -1) continue;
      const uint32_t position = next_[static_cast<size_t>(choices.ids[i])]++;
      position_of_[i] = position;
      token_of_[position] = static_cast<uint32_t>(token);
      weight_of_[position] = choices.weights[i];
    }
  }
}

size_t Grouping::rows_per_chunk(size_t expert) const {
  const size_t num_rows = num_positions(expert);
  const size_t num_chunks = ceil_div(num_rows, kMaxRows);
  return round_up(ceil_div(num_rows, num_chunks), kRowBlock);
}

void Grouping::cut() {
  by_load_.clear();
  for (const uint32_t e : active_) by_load_.push_back(uint64_t{num_positions(e)} << 32 | ~e);
  std::sort(by_load_.begin(), by_load_.end(), std::greater<>());
  chunks_.clear();
  for (const uint64_t entry : by_load_) {
    const uint32_t expert = ~static_cast<uint32_t>(entry);
    const size_t num_rows = rows_per_chunk(expert);
    for (size_t p = first_position(expert); p < end_position(expert); p += num_rows) {
      chunks_.push_back({expert, p, std::min(num_rows, end_position(expert) - p)});
    }
  }
}

}  // namespace ktt
