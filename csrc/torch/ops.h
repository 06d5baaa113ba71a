// One registration function per op; module.cpp calls them all.
#pragma once
#include <torch/csrc/stable/library.h>

namespace linmu {

using StableLibrary = torch::stable::detail::StableLibrary;

void register_branch_mix_norm_cpu(StableLibrary& lib);
void register_causal_conv1d_cpu(StableLibrary& lib);
void register_causal_conv1d_step_cpu(StableLibrary& lib);
void register_ssd_scan_cpu(StableLibrary& lib);
void register_ssd_step_cpu(StableLibrary& lib);
void register_window_attention_cpu(StableLibrary& lib);

}  // namespace linmu
