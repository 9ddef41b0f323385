// What a forward costs beside its experts: tiny ones of 256 x 256, or none at all. Prints JSON, one
// record for each case: the median and the 99th percentile in microseconds.
//
//   kttrio_overhead THREADS
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kttrio.h"

namespace {

constexpr int32_t kSize = 256;
constexpr int32_t kNumExperts = 8;
constexpr int32_t kMaxTokens = 16;
constexpr int kForwards = 4000;

using Clock = std::chrono::steady_clock;

void check(int32_t code) {
  if (code == KTT_OK) return;
  std::fprintf(stderr, "%s\n", ktt_last_error());
  std::exit(1);
}

struct Case {
  const char* name;
  int32_t top_k;
  bool masked;
  int32_t num_tokens;
  int pause_us;  // before each forward; a long one lets the workers fall asleep
};

constexpr Case kCases[] = {
    {"all masked", 8, true, 1, 0},     {"1 expert", 1, false, 1, 0},
    {"8 experts", 8, false, 1, 0},     {"all masked", 8, true, 16, 0},
    {"8 experts", 8, false, 16, 0},    {"1 expert", 1, false, 1, 2000},
    {"8 experts", 8, false, 16, 2000},
};

class TinyLayer {
 public:
  explicit TinyLayer(int32_t num_threads) {
    check(ktt_pool_create(KTT_ISA_AUTO, num_threads, nullptr, 1, &pool_));
    check(ktt_layer_create(pool_, kNumExperts, kSize, kSize, KTT_FORMAT_BF16, 0,
                           KTT_ACTIVATION_BFLOAT16, kMaxTokens, kNumExperts, &layer_));
    std::vector<uint16_t> matrix(kSize * kSize, 0x3c00);  // some small number
    ktt_expert expert = {};
    expert.gate = expert.up = expert.down = matrix.data();
    expert.matrix_bytes = matrix.size() * sizeof(uint16_t);
    for (int32_t i = 0; i < kNumExperts; ++i) check(ktt_layer_set_expert(layer_, i, &expert));
  }
  ~TinyLayer() {
    ktt_layer_destroy(layer_);
    ktt_pool_destroy(pool_);
  }
  TinyLayer(const TinyLayer&) = delete;
  TinyLayer& operator=(const TinyLayer&) = delete;

  // Microseconds of each forward, sorted.
  std::vector<double> time(const Case& c) const {
    std::vector<int32_t> ids(static_cast<size_t>(c.num_tokens * c.top_k), -1);
    for (size_t i = 0; !c.masked && i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i) % c.top_k;
    const std::vector<float> weights(ids.size(), 1.0f / static_cast<float>(c.top_k));
    const std::vector<uint16_t> x(static_cast<size_t>(c.num_tokens * kSize), 0x3f80);
    std::vector<uint16_t> out(x.size());
    const ktt_forward args = {c.num_tokens, c.top_k,    ids.data(),   weights.data(),
                              x.data(),     out.data(), KTT_BFLOAT16, 0};
    std::vector<double> times;
    for (int i = 0; i < (c.pause_us == 0 ? kForwards : kForwards / 20); ++i) {
      const Clock::time_point start = Clock::now() + std::chrono::microseconds(c.pause_us);
      while (Clock::now() < start) {
      }
      const Clock::time_point begin = Clock::now();
      check(ktt_layer_forward(layer_, &args));
      times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
    }
    std::sort(times.begin(), times.end());
    return times;
  }

 private:
  ktt_pool* pool_ = nullptr;
  ktt_layer* layer_ = nullptr;
};

}  // namespace

int main(int argc, char** argv) {
  const int num_threads = argc == 2 ? std::atoi(argv[1]) : 0;
  if (num_threads < 1) {
    std::fprintf(stderr, "usage: kttrio_overhead THREADS\n");
    return 2;
  }
  const TinyLayer layer(num_threads);
  const char* separator = "[";
  for (const Case& c : kCases) {
    const std::vector<double> times = layer.time(c);
    std::printf(
        "%s\n  {\"threads\": %d, \"case\": \"%s\", \"tokens\": %d, \"pause_us\": %d, "
        "\"us\": %.2f, \"p99_us\": %.2f}",
        separator, num_threads, c.name, c.num_tokens, c.pause_us, times[times.size() / 2],
        times[times.size() * 99 / 100]);
    separator = ",";
  }
  std::printf("\n]\n");
  return 0;
}
