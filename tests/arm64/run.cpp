// Runs one kernel on numbers from a file, and writes its results to another: `run OP INPUT OUTPUT`. The numbers come in
// the order in which an op's function reads them: an int64, or a tensor as its size in bytes and its bytes.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/linmu/causal_conv1d.h"
#include "../../csrc/linmu/causal_conv1d_step.h"
#include "../../csrc/linmu/gated_delta_step.h"
#include "../../csrc/linmu/ssd_scan.h"
#include "../../csrc/linmu/ssd_step.h"

using namespace linmu;

namespace {

std::FILE* input;
std::vector<std::vector<char>> tensors;
std::vector<size_t> results;

int64_t number() {
  int64_t n;
  if (std::fread(&n, sizeof n, 1, input) != 1) std::exit(3);
  return n;
}

// Null where there is none.
void* tensor() {
  const int64_t bytes = number();
  if (bytes < 0) return nullptr;
  auto& mine = tensors.emplace_back(static_cast<size_t>(bytes));
  if (bytes && std::fread(mine.data(), mine.size(), 1, input) != 1) std::exit(3);
  return mine.data();
}

// One that the kernel writes.
void* result() {
  void* data = tensor();
  results.push_back(tensors.size() - 1);
  return data;
}

const Threads threads{1, [](int64_t n, int64_t, const Range& body) {
                        if (n) body(0, n);
                      }};

void ssd_step() {
  SsdStepParams p{};
  p.batch = number(), p.heads = number(), p.head_dim = number(), p.state_dim = number();
  p.groups_x = number(), p.groups_b = number(), p.groups_c = number();
  p.dtype = static_cast<DType>(number());
  p.state = result(), p.x = tensor(), p.dt = tensor(), p.A = tensor(), p.B = tensor(), p.C = tensor();
  p.D = tensor(), p.y = result(), p.threads = threads;
  ssd_step_cpu(p);
}

SsdScanTensor rows(int64_t length, int64_t groups, int64_t size) {
  return {tensor(), length * groups * size, groups * size, size};
}

void ssd_scan() {
  SsdScanParams p{};
  p.batch = number(), p.length = number(), p.heads = number(), p.head_dim = number(), p.state_dim = number();
  p.groups_x = number(), p.groups_b = number(), p.groups_c = number();
  p.dtype = static_cast<DType>(number());
  p.forward.on = p.reverse.on = p.shared_projections = p.gate_per_token = true;
  p.x = rows(p.length, p.groups_x, p.head_dim);
  p.forward.dt = tensor(), p.forward.A = tensor();
  p.forward.B = rows(p.length, p.groups_b, p.state_dim), p.forward.C = rows(p.length, p.groups_c, p.state_dim);
  p.reverse.dt = tensor(), p.reverse.A = tensor(), p.reverse.B = p.forward.B, p.reverse.C = p.forward.C;
  p.gate = tensor(), p.y = result(), p.threads = threads;
  ssd_scan_cpu(p);
}

void causal_conv1d() {
  CausalConv1dParams p{};
  p.batch = number(), p.length = number(), p.dim = number(), p.width = number();
  p.dtype = static_cast<DType>(number()), p.silu = true;
  p.x = tensor(), p.weight = tensor(), p.bias = tensor(), p.y = result(), p.threads = threads;
  causal_conv1d_fwd_cpu(p);
}

void causal_conv1d_step() {
  CausalConv1dStepParams p{};
  p.batch = number(), p.dim = number(), p.width = number();
  p.dtype = static_cast<DType>(number()), p.silu = true;
  p.state = result(), p.x = tensor(), p.weight = tensor(), p.bias = tensor(), p.y = result(), p.threads = threads;
  causal_conv1d_step_cpu(p);
}

void gated_delta_step() {
  GatedDeltaStepParams p{};
  p.batch = number(), p.heads = number(), p.key_dim = number(), p.value_dim = number();
  p.groups_q = number(), p.groups_k = number(), p.groups_v = number();
  p.dtype = static_cast<DType>(number()), p.scale = 0.5, p.normalize = true;
  p.state = result(), p.q = tensor(), p.k = tensor(), p.v = tensor(), p.g = tensor(), p.beta = tensor();
  p.y = result(), p.threads = threads;
  gated_delta_step_cpu(p);
}

const std::pair<const char*, void (*)()> ops[] = {{"ssd_step", ssd_step},
                                                  {"ssd_scan", ssd_scan},
                                                  {"causal_conv1d", causal_conv1d},
                                                  {"causal_conv1d_step", causal_conv1d_step},
                                                  {"gated_delta_step", gated_delta_step}};

}  // namespace

int main(int count, char** words) {
  if (count != 4 || !(input = std::fopen(words[2], "rb"))) return 2;
  tensors.reserve(64);
  for (auto [name, op] : ops)
    if (std::strcmp(name, words[1]) == 0) op();
  std::FILE* output = std::fopen(words[3], "wb");
  if (!output || results.empty()) return 2;
  for (size_t i : results) std::fwrite(tensors[i].data(), tensors[i].size(), 1, output);
  return std::fclose(output);
}
