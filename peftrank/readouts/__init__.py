"""Readouts: hidden states -> scores, one file each. A readout never sees text.

Each is an `nn.Module` with `build(hidden_size, tokenizer, lm_head, *, feature_names, options)`,
`forward(states (R, T, H), batch) -> (S, N)` in float32 (0 at padding), and a class attribute
`turn` that says where in a chat prompt the candidate stands: "none" (in the user's turn, left
open), "after" (the assistant answers after it), "before" (it is the assistant's answer) or "list"
(named by a letter in a list, after which the assistant answers).
"""
