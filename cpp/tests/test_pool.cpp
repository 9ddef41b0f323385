// The pool: every task once, on its own part; exceptions come home; regions follow each other
// safely whether workers spin or sleep.
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "error.h"
#include "pool.h"
#include "topology.h"

namespace ktt {
namespace {

PoolOptions parts_of_one_node(size_t num_threads, size_t num_parts) {
  PoolOptions options;
  options.num_threads = num_threads;
  options.num_parts = num_parts;
  return options;
}

struct Counter {
  explicit Counter(size_t n) : hits(n) {}
  bool all_once() const {
    for (const auto& hit : hits) {
      if (hit.load() != 1) return false;
    }
    return true;
  }
  std::vector<std::atomic<int>> hits;
};

void check_region(Pool& pool, const std::vector<size_t>& counts) {
  std::vector<Counter> counters;
  for (const size_t count : counts) counters.emplace_back(count);
  std::vector<std::atomic<int>> busy(pool.num_threads());
  std::atomic<bool> overlapped{false};
  pool.parallel_for(counts, [&](Pool::Place place, size_t i) {
    if (busy[place.worker].fetch_add(1) != 0) overlapped = true;
    counters[place.part].hits[i].fetch_add(1);
    busy[place.worker].fetch_sub(1);
  });
  CHECK(!overlapped);
  for (const auto& counter : counters) CHECK(counter.all_once());
}

TEST(every_task_runs_once) {
  for (const size_t num_parts : {1, 2, 3}) {
    for (size_t num_threads = num_parts; num_threads <= 4; ++num_threads) {
      Pool pool(parts_of_one_node(num_threads, num_parts));
      CHECK_EQUAL(pool.num_parts(), num_parts);
      CHECK_EQUAL(pool.num_threads(), num_threads);
      for (size_t round = 0; round < 50; ++round) {
        std::vector<size_t> counts(num_parts);
        for (size_t part = 0; part < num_parts; ++part) counts[part] = (round * 7 + part * 3) % 40;
        check_region(pool, counts);
      }
    }
  }
}

TEST(no_task_and_one_task) {
  Pool pool(parts_of_one_node(3, 2));
  check_region(pool, {0, 0});
  check_region(pool, {1, 0});
  check_region(pool, {0, 1});
}

// Plain memory written by one region must be seen by the next: the thread sanitizer watches.
TEST(regions_order_plain_memory) {
  Pool pool(parts_of_one_node(4, 1));
  std::vector<long> values(64);
  for (long round = 0; round < 300; ++round) {
    pool.parallel_for({values.size()}, [&](Pool::Place, size_t i) {
      CHECK_EQUAL(values[(i + 1) % values.size()] >= 0, true);
    });
    pool.parallel_for({values.size()}, [&](Pool::Place, size_t i) { values[i] += 1; });
    CHECK_EQUAL(std::accumulate(values.begin(), values.end(), 0L), (round + 1) * 64);
  }
}

TEST(workers_wake_from_sleep) {
  Pool pool(parts_of_one_node(4, 2));
  for (int round = 0; round < 20; ++round) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(300);
    while (std::chrono::steady_clock::now() < until) std::this_thread::yield();
    check_region(pool, {5, 5});
  }
}

TEST(an_exception_comes_home_and_the_pool_lives_on) {
  for (const size_t num_threads : {1, 4}) {
    Pool pool(parts_of_one_node(num_threads, 1));
    for (size_t round = 0; round < 20; ++round) {
      CHECK_THROWS(pool.parallel_for({16},
                                     [&](Pool::Place, size_t i) {
                                       if (i == round % 16) throw std::runtime_error("task broke");
                                     }),
                   "task broke");
      check_region(pool, {16});
    }
  }
}

TEST(callers_take_turns) {
  Pool pool(parts_of_one_node(3, 1));
  std::vector<std::thread> callers;
  std::atomic<int> num_done{0};
  long guarded = 0;
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 40; ++round) {
        const auto held = pool.lock();
        pool.parallel_for({8}, [&](Pool::Place, size_t) { num_done.fetch_add(1); });
        ++guarded;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  CHECK_EQUAL(num_done.load(), 3 * 40 * 8);
  CHECK_EQUAL(guarded, 3 * 40);
}

TEST(idle_means_that_nobody_holds_the_lock) {
  Pool pool(parts_of_one_node(2, 1));
  std::atomic<bool> is_started{false};
  std::atomic<bool> is_done{false};
  std::thread caller([&] {
    const auto held = pool.lock();
    pool.parallel_for({2}, [&](Pool::Place, size_t) { is_started = true; });
    for (int i = 0; i < 1000; ++i) std::this_thread::yield();
    is_done = true;
  });
  while (!is_started) std::this_thread::yield();
  pool.wait_until_idle();
  CHECK(is_done);
  caller.join();
}

TEST(more_threads_than_processors) {
  Pool pool(parts_of_one_node(12, 1));
  for (int round = 0; round < 10; ++round) check_region(pool, {100});
}

// Threads do not follow a fork: the child may give the pool up and is told of anything else.
TEST(a_forked_process_has_no_workers) {
  auto pool = std::make_unique<Pool>(parts_of_one_node(3, 2));
  check_region(*pool, {4, 4});
  const pid_t child = fork();
  if (child == 0) {
    bool was_refused = false;
    try {
      const auto held = pool->lock();
    } catch (const Error& error) {
      was_refused = std::string(error.what()).find("make a pool here") != std::string::npos;
    }
    alarm(20);  // a child that waits for workers for ever fails instead
    pool->wait_until_idle();
    pool.reset();
    _exit(was_refused ? 0 : 1);
  }
  int status = -1;
  CHECK_EQUAL(waitpid(child, &status, 0), child);
  CHECK_EQUAL(status, 0);
  check_region(*pool, {4, 4});
}

TEST(bad_options_say_why) {
  PoolOptions options;
  options.nodes = {999};
  CHECK_THROWS(Pool(options), "NUMA node 999 has no processor this process may use");
  CHECK_THROWS(Pool(parts_of_one_node(2, 3)), "a pool of 3 parts needs at least as many threads");
}

TEST(named_nodes_may_repeat) {
  const int node = allowed_nodes()[0].id;
  PoolOptions options;
  options.nodes = {node, node};
  options.num_threads = 3;
  Pool pool(options);
  CHECK_EQUAL(pool.num_parts(), size_t{2});
  check_region(pool, {9, 9});
}

TEST(default_threads_fill_the_cores_or_the_quota) {
  size_t num_cores = 0;
  for (const auto& node : allowed_nodes()) num_cores += static_cast<size_t>(node.num_cores);
  const size_t quota = cpu_quota();
  const size_t wanted = quota == 0 ? num_cores : std::min(quota, num_cores);
  CHECK_EQUAL(Pool(parts_of_one_node(0, 1)).num_threads(), wanted);
}

TEST(quotas_of_control_groups) {
  CHECK_EQUAL(parse_quota("max 100000"), size_t{0});
  CHECK_EQUAL(parse_quota("-1 100000"), size_t{0});
  CHECK_EQUAL(parse_quota("200000 100000"), size_t{2});
  CHECK_EQUAL(parse_quota("250000 100000"), size_t{3});
  CHECK_EQUAL(parse_quota("5000 100000"), size_t{1});
  CHECK_EQUAL(parse_quota(" "), size_t{0});
}

// The processors all threads of this process may use, given back when it ends.
class Affinity {
 public:
  Affinity() {
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
      const pid_t thread = std::stoi(entry.path().filename().string());
      cpu_set_t mask;
      CHECK_EQUAL(sched_getaffinity(thread, sizeof(mask), &mask), 0);
      before_.emplace_back(thread, mask);
    }
  }
  ~Affinity() {
    for (const auto& [thread, mask] : before_) sched_setaffinity(thread, sizeof(mask), &mask);
  }
  void set(int cpu) const {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    for (const auto& [thread, mask] : before_) sched_setaffinity(thread, sizeof(one), &one);
  }

 private:
  std::vector<std::pair<pid_t, cpu_set_t>> before_;
};

// A container's share of the machine is its affinity mask.
TEST(only_processors_of_the_mask_count) {
  const int cpu = allowed_nodes().back().cpus.back();
  const Affinity affinity;
  affinity.set(cpu);
  const auto pinned = allowed_nodes();
  CHECK_EQUAL(pinned.size(), size_t{1});
  CHECK_EQUAL(pinned[0].cpus.size(), size_t{1});
  CHECK_EQUAL(pinned[0].cpus[0], cpu);
}

// As OpenMP does to the main thread while its other threads have the other processors.
TEST(a_thread_that_is_bound_does_not_narrow_the_process) {
  const auto before = allowed_nodes();
  std::thread bound([&] {
    pin_to({before.back().cpus.back()});
    const auto nodes = allowed_nodes();
    CHECK_EQUAL(nodes.size(), before.size());
    CHECK_EQUAL(nodes[0].cpus.size(), before[0].cpus.size());
  });
  bound.join();
}

// Two pools of as many threads as there are cores, both at work: whoever waits sleeps, so that no
// region takes longer than the work of both and the system's time slices.
TEST(pools_share_a_machine) {
  constexpr int kRegions = 200;
  const auto spin_for = [](std::chrono::microseconds time) {
    const auto until = std::chrono::steady_clock::now() + time;
    while (std::chrono::steady_clock::now() < until) {
    }
  };
  const auto drive = [&] {
    Pool pool(parts_of_one_node(0, 1));
    const size_t num_tasks = 2 * pool.num_threads();
    for (int i = 0; i < kRegions; ++i) {
      pool.parallel_for({num_tasks},
                        [&](Pool::Place, size_t) { spin_for(std::chrono::microseconds(20)); });
    }
  };
  const auto begin = std::chrono::steady_clock::now();
  std::thread other(drive);
  drive();
  other.join();
  const auto time = std::chrono::steady_clock::now() - begin;
  CHECK(time < kRegions * std::chrono::milliseconds(8));
}

}  // namespace
}  // namespace ktt
