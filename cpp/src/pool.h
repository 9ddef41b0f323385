// The only threads there are: workers in one or more parts, each part bound to a NUMA node. The
// thread that calls parallel_for is a worker itself while the call lasts, so as many threads as
// cores leave no one waiting for a core.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "fork.h"
#include "memory.h"
#include "topology.h"
#include "wait_word.h"

namespace ktt {

struct PoolOptions {
  size_t num_threads = 0;  // the calling thread included; 0: the cores or the CPU time we may use
  std::vector<int> nodes;  // NUMA node of each part; empty: see num_parts
  size_t num_parts = 0;    // 0: one for each NUMA node we may use; else round them
};

class Pool {
 public:
  // Throws Error when a node has no processor we may use or a part would have no thread.
  explicit Pool(const PoolOptions& options);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  size_t num_parts() const { return parts_.size(); }
  size_t num_threads() const { return num_threads_; }
  size_t num_threads(size_t part) const { return parts_[part]->num_threads; }
  size_t part_of(size_t worker) const;
  // The NUMA node of a part's memory; -1 when the machine has one node only.
  int memory_node(size_t part) const { return parts_[part]->memory_node; }

  // Where a task runs; worker is below num_threads() and no two tasks of a worker overlap.
  struct Place {
    size_t part;
    size_t worker;
  };

  // Runs fn(Place, i) for each part and each i < counts[part], on that part's workers, and returns
  // when all are done. The first exception is thrown again here, once every task has ended; tasks
  // not yet begun by then are left out. One caller at a time, see lock().
  template <class Fn>
  void parallel_for(const std::vector<size_t>& counts, Fn&& fn) {
    run(counts, [](void* f, Place place, size_t i) { (*static_cast<Fn*>(f))(place, i); }, &fn);
  }

  // Whoever holds this may call parallel_for and use what belongs to the pool. Throws Error in a
  // process forked from the pool's own: threads do not follow there.
  [[nodiscard]] std::unique_lock<std::mutex> lock();
  // Returns once whoever holds the lock has given it up.
  void wait_until_idle();
  // In a process forked from the pool's own: it has none of the workers.
  bool is_forked() const { return fork_generation() != generation_; }

  // Lets the calling thread run where worker 0 should: for threads of our own that call
  // parallel_for. Others are never bound.
  void bind_caller() const;

 private:
  using Task = void (*)(void* context, Place place, size_t index);

  struct alignas(kCacheLine) Part {
    // Tasks not yet claimed; at or below zero there is none. A claim is valid for the region that
    // runs at that moment, which cannot end before the claimed task has.
    std::atomic<int64_t> unclaimed{0};
    size_t count = 0;
    size_t num_threads = 0;
    int memory_node = -1;
  };

  void run(const std::vector<size_t>& counts, Task task, void* context);
  void work(Place place);
  void worker_loop(Place place, const std::vector<int>& cpus);
  void start_workers(const std::vector<NumaNode>& nodes, const std::vector<int>& numa_of);
  void stop_workers();

  std::vector<std::unique_ptr<Part>> parts_;
  size_t num_threads_ = 0;
  const uint32_t generation_;
  std::vector<int> caller_cpus_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;

  // The running region; written before its tasks can be claimed.
  Task task_ = nullptr;
  void* context_ = nullptr;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};

  alignas(kCacheLine) WaitWord epoch_;  // counts regions: idle workers wait for the next one
  alignas(kCacheLine) WaitWord open_;   // tasks not yet ended: the caller waits for none
  std::atomic<bool> stop_{false};
};

}  // namespace ktt
