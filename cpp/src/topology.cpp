#include "topology.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <system_error>

namespace ktt {
namespace {

struct FreeCpuSet {
  void operator()(cpu_set_t* set) const { CPU_FREE(set); }
};
using CpuSet = std::unique_ptr<cpu_set_t, FreeCpuSet>;

constexpr int kMaxCpus = 1 << 16;

// Adds the processors that the thread may use.
void add_allowed_cpus(pid_t thread, std::set<int>& cpus) {
  for (int size = 1024; size <= kMaxCpus; size *= 2) {  // a mask too short is refused with EINVAL
    const CpuSet set(CPU_ALLOC(size));
    const size_t bytes = CPU_ALLOC_SIZE(size);
    CPU_ZERO_S(bytes, set.get());
    if (sched_getaffinity(thread, bytes, set.get()) != 0) {
      if (errno == EINVAL) continue;
      return;
    }
    for (int cpu = 0; cpu < size; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set.get())) cpus.insert(cpu);
    }
    return;
  }
}

std::set<int> allowed_cpus() {
  std::set<int> cpus;
  add_allowed_cpus(0, cpus);
  std::error_code ignored;  // without /proc the calling thread has to do
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task", ignored)) {
    add_allowed_cpus(std::atoi(entry.path().filename().c_str()), cpus);
  }
  if (cpus.empty()) cpus.insert(0);
  return cpus;
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "0-3,8" -> {0, 1, 2, 3, 8}; what is not such a list ends it.
std::vector<int> parse_list(const std::string& text) {
  std::vector<int> numbers;
  const char* at = text.c_str();
  while (*at >= '0' && *at <= '9') {
    char* end = nullptr;
    const long first = std::strtol(at, &end, 10);
    const long last = *end == '-' ? std::strtol(end + 1, &end, 10) : first;
    for (long n = first; n <= last && n < kMaxCpus; ++n) numbers.push_back(static_cast<int>(n));
    if (*end != ',') break;
    at = end + 1;
  }
  return numbers;
}

std::map<int, int> node_of_each_cpu() {
  std::map<int, int> node_of;
  const std::string base = "/sys/devices/system/node/";
  for (const int node : parse_list(first_line(base + "online"))) {
    const std::string list = first_line(base + "node" + std::to_string(node) + "/cpulist");
    for (const int cpu : parse_list(list)) node_of[cpu] = node;
  }
  return node_of;
}

// Hyperthreads of one core share this string; processors without it count as cores of their own.
std::string core_of(int cpu) {
  const std::string name = first_line("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                                      "/topology/thread_siblings_list");
  return name.empty() ? std::to_string(cpu) : name;
}

}  // namespace

std::vector<NumaNode> allowed_nodes() {
  const auto node_of = node_of_each_cpu();
  std::map<int, NumaNode> nodes;
  std::map<int, std::vector<int>> second_threads;
  std::set<std::string> cores_seen;
  for (const int cpu : allowed_cpus()) {
    const auto found = node_of.find(cpu);
    const int id = found == node_of.end() ? 0 : found->second;
    NumaNode& node = nodes.try_emplace(id, NumaNode{id, {}, 0}).first->second;
    if (cores_seen.insert(core_of(cpu)).second) {
      node.cpus.push_back(cpu);
      ++node.num_cores;
    } else {
      second_threads[id].push_back(cpu);
    }
  }
  std::vector<NumaNode> result;
  for (auto& [id, node] : nodes) {
    const auto& more = second_threads[id];
    node.cpus.insert(node.cpus.end(), more.begin(), more.end());
    result.push_back(std::move(node));
  }
  return result;
}

size_t parse_quota(const std::string& text) {
  std::istringstream fields(text);
  long quota = 0;
  long period = 0;
  if (!(fields >> quota >> period) || quota <= 0 || period <= 0) return 0;
  return static_cast<size_t>((quota + period - 1) / period);
}

namespace {

// The smallest limit that the group at `path` and its ancestors set, read by `quota_of(folder)`.
template <class QuotaOf>
size_t least_quota(const std::string& root, std::string path, QuotaOf quota_of) {
  size_t least = 0;
  for (;;) {
    while (!path.empty() && path.back() == '/') path.pop_back();
    const size_t quota = quota_of(root + path);
    if (quota != 0 && (least == 0 || quota < least)) least = quota;
    if (path.empty()) return least;
    path.erase(path.rfind('/'));
  }
}

size_t quota_of_version_1(const std::string& folder) {
  return parse_quota(first_line(folder + "/cpu.cfs_quota_us") + " " +
                     first_line(folder + "/cpu.cfs_period_us"));
}

size_t quota_of_version_2(const std::string& folder) {
  return parse_quota(first_line(folder + "/cpu.max"));
}

}  // namespace

// Lines are "<id>:<controllers>:<path>"; version 2 has one, with id 0 and no controllers.
size_t cpu_quota() {
  std::ifstream groups("/proc/self/cgroup");
  std::string line;
  size_t least = 0;
  while (std::getline(groups, line)) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    size_t quota = 0;
    if (controllers.empty()) {
      quota = least_quota("/sys/fs/cgroup", path, quota_of_version_2);
    } else if (("," + controllers + ",").find(",cpu,") != std::string::npos) {
      quota = least_quota("/sys/fs/cgroup/" + controllers, path, quota_of_version_1);
    }
    if (quota != 0 && (least == 0 || quota < least)) least = quota;
  }
  return least;
}

void pin_to(const std::vector<int>& cpus) {
  if (cpus.empty()) return;
  const int size = *std::max_element(cpus.begin(), cpus.end()) + 1;
  const CpuSet set(CPU_ALLOC(size));
  const size_t bytes = CPU_ALLOC_SIZE(size);
  CPU_ZERO_S(bytes, set.get());
  for (const int cpu : cpus) CPU_SET_S(cpu, bytes, set.get());
  static_cast<void>(sched_setaffinity(0, bytes, set.get()));
}

}  // namespace ktt
