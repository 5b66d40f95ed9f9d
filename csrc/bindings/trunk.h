// The kernels of the network's trunk as torch calls them: check, allocate, fill the params,
// launch. cifar_resnet_fast/ops/_trunk/cuda.py calls them in order, the convolutions right behind
// each other: a convolution may start before the kernel before it has ended, and reads its
// fragments before that. stem_forward, stem_evaluate and head_backward wait for the end of the
// kernel before, which may have made or copied the fragments.
// The .h files of conv3x3/, stem/, pool/ and weights/ say what each computes.
#pragma once

#include <torch/csrc/stable/library.h>

#include "bindings/trunk_backward.h"
#include "bindings/trunk_forward.h"
#include "bindings/trunk_weights.h"

namespace cifar_resnet_fast {

// Their names and signatures; cpu.cpp makes them known to torch. conv3x3_f1 is forward_first, and
// so on: conv3x3/conv3x3.h has the codes; head_forward and head_backward are those of the pool.
inline void define_trunk(torch::stable::detail::StableLibrary& m) {
  m.def("prepare_weights(Tensor[] weights, Tensor like) -> Tensor");
  m.def(
      "fold_weights(Tensor[] weights, Tensor[] bn_weights, Tensor[] bn_biases,"
      " Tensor[] running_means, Tensor[] running_vars, float[] eps, Tensor like)"
      " -> (Tensor fragments, Tensor biases)");
  m.def("stem_forward(Tensor images, Tensor fragments, int blocks) -> (Tensor y, Tensor sums)");
  m.def("stem_evaluate(Tensor images, Tensor fragments, Tensor bias, int blocks) -> Tensor x");
  m.def(
      "conv3x3_f1(Tensor y, Tensor sums, Tensor bn_weight, Tensor bn_bias,"
      " Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float eps,"
      " Tensor? shortcut, Tensor fragments, int stride, int blocks)"
      " -> (Tensor x, Tensor out, Tensor out_sums, Tensor norm)");
  m.def(
      "conv3x3_f2(Tensor y, Tensor sums, Tensor bn_weight, Tensor bn_bias,"
      " Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float eps,"
      " Tensor fragments, int blocks) -> (Tensor out, Tensor out_sums, Tensor norm)");
  m.def(
      "conv3x3_evaluate(Tensor x, Tensor fragments, Tensor bias, Tensor? shortcut, int stride,"
      " int blocks) -> Tensor out");
  m.def(
      "head_forward(Tensor y, Tensor sums, Tensor bn_weight, Tensor bn_bias,"
      " Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float eps,"
      " Tensor shortcut, int blocks) -> (Tensor pooled, Tensor mask, Tensor norm)");
  m.def(
      "head_backward(Tensor dpooled, Tensor mask, Tensor y, Tensor norm, int blocks)"
      " -> (Tensor dz, Tensor dz_sums)");
  m.def(
      "conv3x3_b2(Tensor dz, Tensor y, Tensor sums, Tensor bn_weight, Tensor norm,"
      " Tensor y_before, Tensor norm_before, Tensor fragments, Tensor? left_slabs,"
      " Tensor(a!)? left_dweight, int blocks)"
      " -> (Tensor out, Tensor out_sums, Tensor slabs, Tensor dbn_weight, Tensor dbn_bias)");
  m.def(
      "conv3x3_b1(Tensor dz, Tensor y, Tensor sums, Tensor bn_weight, Tensor norm, Tensor x,"
      " Tensor residual, Tensor y_before, Tensor norm_before, Tensor fragments,"
      " Tensor? left_slabs, Tensor(a!)? left_dweight, int stride, int blocks)"
      " -> (Tensor out, Tensor out_sums, Tensor slabs, Tensor dbn_weight, Tensor dbn_bias)");
  m.def(
      "stem_backward(Tensor dz, Tensor y, Tensor sums, Tensor bn_weight, Tensor norm,"
      " Tensor images, Tensor? left_slabs, Tensor(a!)? left_dweight, int blocks)"
      " -> (Tensor slabs, Tensor dbn_weight, Tensor dbn_bias)");
  m.def("sum_slabs(Tensor slabs, Tensor(a!) dweight, int blocks) -> ()");
}

template <typename Launch>
void register_trunk(torch::stable::detail::StableLibrary& m) {
  m.impl("prepare_weights", TORCH_BOX(&trunk::prepare_weights<Launch>));
  m.impl("fold_weights", TORCH_BOX(&trunk::fold_weights<Launch>));
  m.impl("stem_forward", TORCH_BOX(&trunk::stem_forward<Launch>));
  m.impl("stem_evaluate", TORCH_BOX(&trunk::stem_evaluate<Launch>));
  m.impl("conv3x3_f1", TORCH_BOX(&trunk::forward_first<Launch>));
  m.impl("conv3x3_f2", TORCH_BOX(&trunk::forward_second<Launch>));
  m.impl("conv3x3_evaluate", TORCH_BOX(&trunk::conv3x3_evaluate<Launch>));
  m.impl("head_forward", TORCH_BOX(&trunk::pool_forward<Launch>));
  m.impl("head_backward", TORCH_BOX(&trunk::pool_backward<Launch>));
  m.impl("conv3x3_b2", TORCH_BOX(&trunk::backward_second<Launch>));
  m.impl("conv3x3_b1", TORCH_BOX(&trunk::backward_first<Launch>));
  m.impl("stem_backward", TORCH_BOX(&trunk::stem_backward<Launch>));
  m.impl("sum_slabs", TORCH_BOX(&trunk::sum_slabs<Launch>));
}

}  // namespace cifar_resnet_fast
