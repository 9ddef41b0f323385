// What this machine can do at most: reading memory and multiplying, on some threads at once. Prints
// a line of JSON: bytes and operations per second, the median of several runs and the best one.
// Then it answers every line of input with one more reading: what a virtual machine is given
// changes from second to second, so who measures against a limit asks for it all the time.
//
//   kttrio_limits THREADS MIB_TO_READ < /dev/null
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "kttrio.h"
#include "memory.h"
#include "peaks.h"
#include "topology.h"

namespace ktt::bench {
namespace {

constexpr int kRuns = 9;
constexpr long kSteps = 2'000'000;  // some milliseconds of each instruction

using Clock = std::chrono::steady_clock;

// One processor for each thread, each core before second hyperthreads.
std::vector<int> processors(size_t num_threads) {
  std::vector<int> cpus;
  for (const NumaNode& node : allowed_nodes()) {
    cpus.insert(cpus.end(), node.cpus.begin(), node.cpus.begin() + node.num_cores);
  }
  if (cpus.size() < num_threads) {
    std::fprintf(stderr, "%zu threads, but this process may use %zu cores; ask for fewer\n",
                 num_threads, cpus.size());
    std::exit(2);
  }
  cpus.resize(num_threads);
  return cpus;
}

// Calls `work` on pinned threads that start together; seconds until the last has ended.
double on_all(const std::vector<int>& cpus, const std::function<void(size_t)>& work) {
  std::atomic<size_t> num_ready = 0;
  std::atomic<bool> go = false;
  std::vector<std::thread> threads;
  for (size_t i = 0; i < cpus.size(); ++i) {
    threads.emplace_back([&, i] {
      pin_to({cpus[i]});
      num_ready.fetch_add(1);
      while (!go.load()) {
      }
      work(i);
    });
  }
  while (num_ready.load() < cpus.size()) std::this_thread::yield();
  const Clock::time_point begin = Clock::now();
  go = true;
  for (std::thread& thread : threads) thread.join();
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

struct Rate {
  double median;
  double best;
};

Rate measure(const std::vector<int>& cpus, double amount, const std::function<void(size_t)>& work) {
  std::vector<double> rates;
  for (int run = 0; run < kRuns; ++run) rates.push_back(amount / on_all(cpus, work));
  std::sort(rates.begin(), rates.end());
  return {rates[kRuns / 2], rates.back()};
}

void print(const char* name, const Rate& rate) {
  std::printf(", \"%s\": {\"median\": %.6g, \"best\": %.6g}", name, rate.median, rate.best);
}

// Plain loads: the processor's own prefetching is as fast as any by hand.
void read_all(const std::byte* from, size_t num_bytes) {
  constexpr size_t kStep = 256;
  const std::byte* const end = from + num_bytes / kStep * kStep;
  __asm__ volatile(
      "1:\n"
      ".irp i,0,32,64,96,128,160,192,224\n"
      "vmovdqa \\i(%0), %%ymm0\n"
      ".endr\n"
      "add %2, %0\n"
      "cmp %1, %0\n"
      "jb 1b\n"
      "vzeroupper"
      : "+r"(from)
      : "r"(end), "i"(kStep)
      : "cc", "memory", "xmm0");
}

// Memory that every thread touched its share of first, so that it lies on the thread's own node.
class Reading {
 public:
  Reading(const std::vector<int>& cpus, size_t num_bytes, int advice)
      : cpus_(cpus),
        share_(num_bytes / cpus.size() / kHugePage * kHugePage),
        buffer_(share_ * cpus.size(), -1) {
    madvise(buffer_.data(), buffer_.size(), advice);
    on_all(cpus_, [this](size_t i) { std::memset(part(i), 1, share_); });
  }

  double num_bytes() const { return static_cast<double>(buffer_.size()); }
  double huge_share() const { return static_cast<double>(buffer_.huge_page_bytes()) / num_bytes(); }
  void operator()(size_t thread) const { read_all(part(thread), share_); }

 private:
  std::byte* part(size_t thread) const { return buffer_.data() + thread * share_; }

  std::vector<int> cpus_;
  size_t share_;
  Buffer buffer_;
};

void print_peaks(const std::vector<int>& cpus) {
  for (const Peak& peak : peaks()) {
    if (ktt_isa_granted(peak.isa) == 0) continue;
    const double ops = peak.ops_per_step * double{kSteps} * static_cast<double>(cpus.size());
    print(peak.name, measure(cpus, ops, [&](size_t) { peak.run(kSteps); }));
  }
}

void answer_lines(const std::vector<int>& cpus, const Reading& reading) {
  for (std::string line; std::getline(std::cin, line);) {
    std::printf("%.6g\n", reading.num_bytes() / on_all(cpus, std::cref(reading)));
    std::fflush(stdout);
  }
}

void run(const std::vector<int>& cpus, size_t num_bytes) {
  std::printf("{\"threads\": %zu", cpus.size());
  {
    const Reading small_pages(cpus, num_bytes, MADV_NOHUGEPAGE);
    print("read_4k", measure(cpus, small_pages.num_bytes(), std::cref(small_pages)));
  }
  const Reading huge_pages(cpus, num_bytes, MADV_HUGEPAGE);
  print("read_2m", measure(cpus, huge_pages.num_bytes(), std::cref(huge_pages)));
  std::printf(", \"huge_share\": %.2f", huge_pages.huge_share());
  print_peaks(cpus);
  std::printf("}\n");
  std::fflush(stdout);
  answer_lines(cpus, huge_pages);
}

}  // namespace
}  // namespace ktt::bench

int main(int argc, char** argv) {
  const long num_threads = argc == 3 ? std::atol(argv[1]) : 0;
  const long mib = argc == 3 ? std::atol(argv[2]) : 0;
  if (num_threads < 1 || mib < 2 * num_threads) {
    std::fprintf(stderr, "usage: kttrio_limits THREADS MIB_TO_READ, at least 2 MiB a thread\n");
    return 2;
  }
  const std::vector<int> cpus = ktt::bench::processors(static_cast<size_t>(num_threads));
  ktt::bench::run(cpus, static_cast<size_t>(mib) << 20);
  return 0;
}
