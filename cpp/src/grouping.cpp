#include "grouping.h"

#include <algorithm>
#include <string>

#include "error.h"
#include "kernels/kernel_table.h"

namespace ktt {
namespace {

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

void Grouping::reserve(size_t num_experts, size_t num_positions) {
  grow(first_, num_experts + 1);
  grow(next_, num_experts);
  grow(chunk_end_, num_experts);
  by_id_.reserve(num_experts);
  by_load_.reserve(num_experts);
  grow(token_of_, num_positions);
  grow(weight_of_, num_positions);
}

void Grouping::group(const Choices& choices, const std::vector<bool>& is_set) {
  count(choices, is_set);
  deal(choices, is_set.size());
  order(is_set.size());
  num_positions_ = first_[is_set.size()];
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

void Grouping::deal(const Choices& choices, size_t num_experts) {
  for (size_t e = 0; e < num_experts; ++e) {
    next_[e] = first_[e];
    first_[e + 1] += first_[e];
  }
  for (size_t i = 0; i < choices.num_tokens * choices.top_k; ++i) {
    if (choices.ids[i] == -1) continue;
    const uint32_t position = next_[static_cast<size_t>(choices.ids[i])]++;
    token_of_[position] = static_cast<uint32_t>(i / choices.top_k);
    weight_of_[position] = choices.weights[i];
  }
}

void Grouping::order(size_t num_experts) {
  by_id_.clear();
  for (size_t e = 0; e < num_experts; ++e) {
    if (num_positions(e) > 0) by_id_.push_back(static_cast<uint32_t>(e));
  }
  by_load_ = by_id_;
  std::sort(by_load_.begin(), by_load_.end(), [this](uint32_t a, uint32_t b) {
    const size_t load_a = num_positions(a);
    const size_t load_b = num_positions(b);
    return load_a != load_b ? load_a > load_b : a < b;
  });
  size_t end = 0;
  for (size_t i = 0; i < by_load_.size(); ++i) {
    end += (num_positions(by_load_[i]) + kMaxPanelRows - 1) / kMaxPanelRows;
    chunk_end_[i] = end;
  }
}

Grouping::Chunk Grouping::chunk(size_t index) const {
  const auto begin = chunk_end_.begin();
  const auto end = begin + static_cast<ptrdiff_t>(by_load_.size());
  const auto rank = static_cast<size_t>(std::upper_bound(begin, end, index) - begin);
  const size_t expert = by_load_[rank];
  const size_t before = rank == 0 ? 0 : chunk_end_[rank - 1];
  const size_t first = first_[expert] + (index - before) * kMaxPanelRows;
  return {expert, first, std::min(kMaxPanelRows, end_position(expert) - first)};
}

}  // namespace ktt
