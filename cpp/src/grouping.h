// Tokens grouped by expert: who computes what in one forward. Plain bookkeeping.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace ktt {

// Each token's experts and their weights, as the caller gives them; an id of -1 is skipped.
struct Choices {
  size_t num_tokens;
  size_t top_k;
  const int32_t* ids;    // [num_tokens, top_k]
  const float* weights;  // [num_tokens, top_k]
};

// A position is one (token, k) that is computed here; the positions of an expert are neighbours,
// in order of their tokens.
class Grouping {
 public:
  // Makes room, so that `group` allocates nothing.
  void reserve(size_t num_experts, size_t num_positions);

  // Throws Error for an id of no expert, or of one that is not `is_set`.
  void group(const Choices& choices, const std::vector<bool>& is_set);

  size_t num_positions() const { return num_positions_; }
  size_t num_positions(size_t expert) const { return first_[expert + 1] - first_[expert]; }
  size_t first_position(size_t expert) const { return first_[expert]; }
  size_t end_position(size_t expert) const { return first_[expert + 1]; }
  const uint32_t* token_of() const { return token_of_.data(); }   // [positions]
  const float* weight_of() const { return weight_of_.data(); }    // [positions]
  const std::vector<uint32_t>& active() const { return by_id_; }  // experts, ascending

  // Positions of the active experts in chunks of at most kMaxPanelRows, busiest expert first.
  struct Chunk {
    size_t expert;
    size_t first_position;
    size_t num_rows;
  };
  size_t num_chunks() const { return by_load_.empty() ? 0 : chunk_end_[by_load_.size() - 1]; }
  Chunk chunk(size_t index) const;

 private:
  void count(const Choices& choices, const std::vector<bool>& is_set);
  void deal(const Choices& choices, size_t num_experts);
  void order(size_t num_experts);

  std::vector<uint32_t> first_;  // [num_experts + 1]: an expert's first position
  std::vector<uint32_t> next_;   // [num_experts], while positions are dealt out
  std::vector<uint32_t> token_of_;
  std::vector<float> weight_of_;
  std::vector<uint32_t> by_id_;
  std::vector<uint32_t> by_load_;
  std::vector<size_t> chunk_end_;  // chunks up to and with those of by_load_[i]
  size_t num_positions_ = 0;
};

}  // namespace ktt
