"""BatchTopK's arithmetic with fixed sizes, for a GPU that never waits for the host.

A batch top-k keeps at most N*k pairs, so every tensor of a step can have a size that is known
beforehand: an unused slot has feature F, one past the last, and value 0. Then no operation has to
ask the device how large its result is, and a whole step can be captured as one CUDA graph.
`select_kernels` finds the pairs, `pair_kernels` decodes them and sums the gradients,
`update_kernels` moves the weights; `twin` does the same with PyTorch, for a CPU and for tests, and
`backend` picks one of the two. `sharing` makes one top-k of those of several processes. Where much
of the code is active, `dense` sums in place of `pair_kernels`. `nested` cuts a code into those that
have to reconstruct by themselves. `trainer/static_step.py` puts them together.

Every sum has one order, whatever the scheduling: only integers are added atomically. So the same
seed gives the same bytes.
"""
