// One registration function per op; module.cpp calls them all.
#pragma once
#include <torch/csrc/stable/library.h>

namespace linmu {

using StableLibrary = torch::stable::detail::StableLibrary;

void register_branch_mix_norm(StableLibrary& lib);
void register_causal_conv1d(StableLibrary& lib);
void register_causal_conv1d_step(StableLibrary& lib);
void register_exact_step(StableLibrary& lib);
void register_far_attention(StableLibrary& lib);
void register_gated_delta_scan(StableLibrary& lib);
void register_gated_delta_step(StableLibrary& lib);
void register_gated_norm(StableLibrary& lib);
void register_near_attention(StableLibrary& lib);
void register_ssd_scan(StableLibrary& lib);
void register_ssd_step(StableLibrary& lib);
void register_window_attention(StableLibrary& lib);

}  // namespace linmu
