#include "pool.h"

#include <algorithm>
#include <map>
#include <string>
#include <system_error>
#include <utility>

#include "error.h"

namespace ktt {
namespace {

// How many sleepers whoever wakes wakes: they wake as many more each, so that nobody is held up by
// waking a whole machine.
constexpr uint32_t kWokenByEach = 3;

std::string describe(const std::vector<NumaNode>& nodes) {
  std::string text;
  for (const auto& node : nodes) text += (text.empty() ? "" : ", ") + std::to_string(node.id);
  return text;
}

const NumaNode& find_node(const std::vector<NumaNode>& nodes, int id) {
  for (const auto& node : nodes) {
    if (node.id == id) return node;
  }
  throw Error(ErrorCode::kInvalidArgument,
              "NUMA node " + std::to_string(id) +
                  " has no processor this process may use; nodes that have: " + describe(nodes));
}

// The NUMA node of each part.
std::vector<int> place_parts(const PoolOptions& options, const std::vector<NumaNode>& nodes) {
  for (const int id : options.nodes) find_node(nodes, id);
  if (!options.nodes.empty()) return options.nodes;
  std::vector<int> result(options.num_parts == 0 ? nodes.size() : options.num_parts);
  for (size_t i = 0; i < result.size(); ++i) result[i] = nodes[i % nodes.size()].id;
  return result;
}

size_t default_threads(const std::vector<NumaNode>& nodes, std::vector<int> numa_of) {
  const size_t num_parts = numa_of.size();
  std::sort(numa_of.begin(), numa_of.end());
  numa_of.erase(std::unique(numa_of.begin(), numa_of.end()), numa_of.end());
  size_t num_cores = 0;
  for (const int id : numa_of) num_cores += static_cast<size_t>(find_node(nodes, id).num_cores);
  const size_t quota = cpu_quota();
  if (quota != 0) num_cores = std::min(num_cores, quota);
  return std::max(num_cores, num_parts);
}

// Deals out a node's processors to the threads that share it: one each when they fill its cores,
// else all of them, since then the scheduler knows better which are free.
class Dealer {
 public:
  explicit Dealer(const std::vector<NumaNode>& nodes) : nodes_(nodes) {}

  void expect(int numa_node) { ++num_threads_[numa_node]; }

  std::vector<int> next(int numa_node) {
    const NumaNode& node = find_node(nodes_, numa_node);
    size_t& used = used_[numa_node];
    if (num_threads_[numa_node] < node.num_cores || used == node.cpus.size()) return node.cpus;
    return {node.cpus[used++]};
  }

 private:
  const std::vector<NumaNode>& nodes_;
  std::map<int, int> num_threads_;
  std::map<int, size_t> used_;
};

}  // namespace

Pool::Pool(const PoolOptions& options) : generation_(fork_generation()) {
  const auto nodes = allowed_nodes();
  const auto numa_of = place_parts(options, nodes);
  num_threads_ = options.num_threads == 0 ? default_threads(nodes, numa_of) : options.num_threads;
  if (num_threads_ < numa_of.size()) {
    throw Error(ErrorCode::kInvalidArgument, "a pool of " + std::to_string(numa_of.size()) +
                                                 " parts needs at least as many threads, not " +
                                                 std::to_string(num_threads_));
  }
  for (const int id : numa_of) {
    parts_.push_back(std::make_unique<Part>());
    parts_.back()->memory_node = nodes.size() > 1 ? id : -1;
  }
  for (size_t t = 0; t < num_threads_; ++t) ++parts_[t % parts_.size()]->num_threads;
  try {
    start_workers(nodes, numa_of);
  } catch (const std::system_error& error) {
    const size_t num_started = workers_.size() + 1;
    stop_workers();
    throw Error(ErrorCode::kUnsupported,
                "only " + std::to_string(num_started) + " of " + std::to_string(num_threads_) +
                    " threads could be started: " + error.what() +
                    "; ask for fewer, or raise the limits on processes and memory (ulimit -a)");
  } catch (...) {
    stop_workers();
    throw;
  }
}

Pool::~Pool() { stop_workers(); }

// Worker 0 is whoever calls; a processor is left free for it.
void Pool::start_workers(const std::vector<NumaNode>& nodes, const std::vector<int>& numa_of) {
  Dealer dealer(nodes);
  for (size_t part = 0; part < parts_.size(); ++part) {
    for (size_t i = 0; i < parts_[part]->num_threads; ++i) dealer.expect(numa_of[part]);
  }
  size_t worker = 0;
  for (size_t part = 0; part < parts_.size(); ++part) {
    for (size_t i = 0; i < parts_[part]->num_threads; ++i, ++worker) {
      auto cpus = dealer.next(numa_of[part]);
      if (worker == 0) {
        caller_cpus_ = std::move(cpus);
        continue;
      }
      workers_.emplace_back([this, place = Place{part, worker}, cpus = std::move(cpus)] {
        worker_loop(place, cpus);
      });
    }
  }
}

void Pool::bind_caller() const { pin_to(caller_cpus_); }

size_t Pool::part_of(size_t worker) const {
  size_t part = 0;
  for (; worker >= parts_[part]->num_threads; ++part) worker -= parts_[part]->num_threads;
  return part;
}

std::unique_lock<std::mutex> Pool::lock() {
  if (is_forked()) {
    throw Error(ErrorCode::kUnsupported,
                "this pool's threads live in the process it was forked from; make a pool here");
  }
  return std::unique_lock(mutex_);
}

void Pool::wait_until_idle() {
  if (!is_forked()) const std::scoped_lock held(mutex_);
}

void Pool::stop_workers() {
  if (is_forked()) {  // there is nobody here to wait for
    for (auto& worker : workers_) worker.detach();
    return;
  }
  stop_.store(true, std::memory_order_release);
  epoch_.add(1);
  epoch_.wake(WaitWord::kAll);
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

void Pool::worker_loop(Place place, const std::vector<int>& cpus) {
  pin_to(cpus);
  for (;;) {
    const uint32_t seen = epoch_.load();
    if (stop_.load(std::memory_order_acquire)) return;
    work(place);
    const bool has_slept = epoch_.wait(seen);
    if (has_slept) epoch_.wake(kWokenByEach);
  }
}

void Pool::work(Place place) {
  Part& part = *parts_[place.part];
  uint32_t num_done = 0;
  for (;;) {
    const int64_t left = part.unclaimed.fetch_sub(1, std::memory_order_acq_rel);
    if (left <= 0) break;
    ++num_done;
    if (failed_.load(std::memory_order_relaxed)) continue;
    try {
      task_(context_, place, part.count - static_cast<size_t>(left));
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }
  if (num_done > 0 && open_.subtract(num_done) == 0) open_.wake(1);
}

void Pool::run(const std::vector<size_t>& counts, Task task, void* context) {
  size_t total = 0;
  for (const size_t count : counts) total += count;
  if (total == 0) return;
  task_ = task;
  context_ = context;
  failed_.store(false, std::memory_order_relaxed);
  open_.store(static_cast<uint32_t>(total));
  for (size_t i = 0; i < parts_.size(); ++i) {
    parts_[i]->count = counts[i];
    parts_[i]->unclaimed.store(static_cast<int64_t>(counts[i]), std::memory_order_release);
  }
  if (!workers_.empty() && (total > 1 || counts[0] == 0)) {
    epoch_.add(1);
    epoch_.wake(kWokenByEach);
  }
  work({0, 0});
  for (uint32_t open; (open = open_.load()) != 0;) open_.wait(open);
  if (failed_.load(std::memory_order_relaxed)) {
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

}  // namespace ktt
