// Grouping: every chosen (token, k) at one position, neighbours by expert, chunks cover all rows.
#include <algorithm>
#include <string>

#include "check.h"
#include "error.h"
#include "grouping.h"
#include "kernels/kernel_table.h"

namespace ktt {
namespace {

TEST(positions_of_an_expert_are_neighbours_in_token_order) {
  const int32_t ids[] = {2, 0, -1, 2, 2, 2};
  const float weights[] = {1, 2, 3, 4, 5, 6};
  Grouping grouping;
  grouping.reserve(3, 6);
  grouping.group({3, 2, ids, weights}, {true, true, true});
  CHECK(grouping.active() == (std::vector<uint32_t>{0, 2}));
  CHECK_EQUAL(grouping.num_positions(1), size_t{0});
  const uint32_t tokens[] = {0, 0, 1, 2, 2};
  const float wanted[] = {2, 1, 4, 5, 6};
  const uint32_t positions[] = {1, 0, Grouping::kNowhere, 2, 3, 4};
  CHECK(std::equal(tokens, tokens + 5, grouping.token_of()));
  CHECK(std::equal(wanted, wanted + 5, grouping.weight_of()));
  CHECK(std::equal(positions, positions + 6, grouping.position_of()));
}

TEST(chunks_cover_all_rows_busiest_first) {
  constexpr size_t kTokens = 2 * kMaxRows + 10;
  std::vector<int32_t> ids(kTokens, 1);
  ids[0] = ids[1] = 0;
  const std::vector<float> weights(kTokens, 1.0f);
  Grouping grouping;
  grouping.reserve(2, kTokens);
  grouping.group({kTokens, 1, ids.data(), weights.data()}, {true, true});
  CHECK_EQUAL(grouping.chunks().size(), size_t{4});
  size_t position = 2;
  for (size_t i = 0; i < 3; ++i) {
    const auto& chunk = grouping.chunks()[i];
    CHECK_EQUAL(chunk.expert, size_t{1});
    CHECK_EQUAL(chunk.first_position, position);
    CHECK_EQUAL(chunk.num_rows, i < 2 ? size_t{176} : size_t{168});  // none is left with a few
    position += chunk.num_rows;
  }
  CHECK_EQUAL(position, kTokens);
  CHECK_EQUAL(grouping.chunks()[3].expert, size_t{0});
  CHECK_EQUAL(grouping.chunks()[3].num_rows, size_t{2});
}

TEST(nothing_to_do) {
  const int32_t ids[] = {-1, -1};
  const float weights[] = {1, 1};
  Grouping grouping;
  grouping.reserve(4, 2);
  grouping.group({2, 1, ids, weights}, std::vector<bool>(4, true));
  CHECK(grouping.chunks().empty());
  CHECK(grouping.active().empty());
}

TEST(unknown_and_unset_experts_are_named) {
  const int32_t ids[] = {0, 3};
  const float weights[] = {1, 1};
  Grouping grouping;
  grouping.reserve(4, 2);
  const Choices choices = {2, 1, ids, weights};
  CHECK_THROWS(grouping.group(choices, {true, true}), "ids[1][0] = 3, but experts go from 0 to 1");
  CHECK_THROWS(grouping.group(choices, {true, true, true, false}), "has no weights here");
}

}  // namespace
}  // namespace ktt
