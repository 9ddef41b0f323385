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
  static constexpr uint32_t kNowhere = ~uint32_t{0};

  // Makes room, so that `group` allocates nothing.
  void reserve(size_t num_experts, size_t num_choices);

  // Throws Error for an id of no expert, or of one that is not `is_set`.
  void group(const Choices& choices, const std::vector<bool>& is_set);

  size_t num_positions() const { return active_.empty() ? 0 : end_position(active_.back()); }
  size_t num_positions(size_t expert) const { return first_[expert + 1] - first_[expert]; }
  size_t first_position(size_t expert) const { return first_[expert]; }
  size_t end_position(size_t expert) const { return first_[expert + 1]; }
  const uint32_t* token_of() const { return token_of_.data(); }        // [positions]
  const float* weight_of() const { return weight_of_.data(); }         // [positions]
  const uint32_t* position_of() const { return position_of_.data(); }  // [choices] or kNowhere
  const std::vector<uint32_t>& active() const { return active_; }      // experts, ascending

  // Neighbouring positions of an expert, at most kMaxRows.
  struct Chunk {
    size_t expert;
    size_t first_position;
    size_t num_rows;
  };
  // All positions, those of the busiest expert first.
  const std::vector<Chunk>& chunks() const { return chunks_; }
  // How an expert's positions are cut: into chunks alike, of this many rows but for the last one.
  size_t rows_per_chunk(size_t expert) const;

  static size_t max_chunks(size_t num_experts, size_t num_choices);

 private:
  void count(const Choices& choices, const std::vector<bool>& is_set);
  void find_active(size_t num_experts);
  void deal(const Choices& choices);
  void cut();

  std::vector<uint32_t> first_;  // [num_experts + 1]: an expert's first position
  std::vector<uint32_t> next_;   // [num_experts], while positions are dealt out
  std::vector<uint32_t> token_of_;
  std::vector<float> weight_of_;
  std::vector<uint32_t> position_of_;
  std::vector<uint32_t> active_;
  std::vector<uint64_t> by_load_;  // number of positions, then the expert, in one number
  std::vector<Chunk> chunks_;
};

}  // namespace ktt
