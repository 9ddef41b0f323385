#include "topology.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <string>

namespace ktt {
namespace {

struct FreeCpuSet {
  void operator()(cpu_set_t* set) const { CPU_FREE(set); }
};
using CpuSet = std::unique_ptr<cpu_set_t, FreeCpuSet>;

constexpr int kMaxCpus = 1 << 16;

std::vector<int> allowed_cpus() {
  for (int size = 1024; size <= kMaxCpus; size *= 2) {  // a mask too short is refused with EINVAL
    const CpuSet set(CPU_ALLOC(size));
    const size_t bytes = CPU_ALLOC_SIZE(size);
    CPU_ZERO_S(bytes, set.get());
    if (sched_getaffinity(0, bytes, set.get()) != 0) {
      if (errno == EINVAL) continue;
      break;
    }
    std::vector<int> cpus;
    for (int cpu = 0; cpu < size; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set.get())) cpus.push_back(cpu);
    }
    if (!cpus.empty()) return cpus;
  }
  return {0};
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

size_t parse_cpu_max(const std::string& text) {
  std::istringstream fields(text);
  size_t quota = 0;
  size_t period = 0;
  if (!(fields >> quota >> period) || period == 0) return 0;  // "max": no limit
  return std::max<size_t>(1, (quota + period - 1) / period);
}

size_t cpu_quota() {
  const std::string prefix = "0::";  // the one hierarchy of version 2
  std::ifstream groups("/proc/self/cgroup");
  std::string line;
  while (std::getline(groups, line) && line.rfind(prefix, 0) != 0) line.clear();
  if (line.empty()) return 0;
  size_t least = 0;
  std::string path = line.substr(prefix.size());  // each ancestor may set a limit
  for (;;) {
    while (!path.empty() && path.back() == '/') path.pop_back();
    const size_t quota = parse_cpu_max(first_line("/sys/fs/cgroup" + path + "/cpu.max"));
    if (quota != 0 && (least == 0 || quota < least)) least = quota;
    if (path.empty()) return least;
    path.erase(path.rfind('/'));
  }
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
