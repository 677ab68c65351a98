"""What other packages call the options here: a TypeError for an unknown name says which one is meant.

docs/migrate.md has the same as tables, with what differs in meaning.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

# Our word, and theirs (Liger, TRL, verl, cut-cross-entropy, transformers).
WORDS = {
    "input": "hidden hidden_states _input student_input",
    "linear_weight": "weight student_weight lin_weight lm_head_weight head_weight classifier",
    "linear_bias": "bias lin_bias lm_head_bias",
    "target": "labels label targets shift_labels selected_token_ids",
    "weight": "ce_weight class_weight class_weights",
    "softcap": "softcapping soft_cap logit_softcap logit_softcapping final_logit_softcapping",
    "ignore_index": "ignore_id",
    "mask": "attention_mask completion_mask loss_mask response_mask",
    "threshold": "gamma",
    "columns": "filter_eps",
    "vocab_size": "num_classes orig_vocab_size",
    "z_loss": "lse_square_scale z_loss_weight z_loss_coef",
    "label_smoothing": "smoothing label_smoothing_factor",
    "group": "dist_process_group process_group tp_group",
    "plan": "chunk_size num_chunks chunks",
    "chunk_rows": "chunk_size",
    "advantages": "advantage",
    "old_logprobs": "old_per_token_logps old_log_probs old_log_prob old_logps",
    "ref_logprobs": "ref_per_token_logps ref_log_probs ref_log_prob ref_logps",
    "sampler_logprobs": "sampling_per_token_logps rollout_log_probs vllm_logprobs",
    "token_weight": "reduction num_items_in_batch loss_weight token_weights",
    "kl_coef": "beta kl_beta kl_coeff kl_loss_coef",
    "kl_estimator": "kl_loss_type",
    "entropy_coef": "entropy_coeff ent_coef",
    "clip_low": "epsilon epsilon_low eps_clip clip_ratio clip_ratio_low cliprange cliprange_low",
    "clip_high": "epsilon epsilon_high eps_clip clip_ratio clip_ratio_high cliprange cliprange_high",
    "dual_clip": "delta clip_ratio_c",
    "ratio_level": "importance_sampling_level",
    "tau_positive": "sapo_temperature_pos tau_pos",
    "tau_negative": "sapo_temperature_neg tau_neg",
    "high": "cap threshold clip_max rollout_is_threshold vllm_importance_sampling_cap",
    "low": "clip_min",
    "outside": "mode",
    "length": "max_completion_length",
    "sequences": "batch_size num_sequences num_items_in_batch",
}
ADVICE = {
    "attention_mask": "put ignore_index into target where a token takes no part",
    "loss_type": "each has a preset: grpo(), dr_grpo(), dapo(), cispo(), sapo(); what it averages over is token_weight",
    "max_completion_length": "pass token_weight=constant_length(mask, sequence_ids, length)",
    "vllm_is_ratio": "pass sampler_logprobs and give the objective correction=Correction(...)",
    "labels": "pass mask=labels != -100",
    "ignore_index": "pass mask=target != ignore_index",
    "use_ref_model": "pass ref_logprobs and give the objective kl_coef",
    "ref_input": "pass ref_logprobs=linear_logprobs(ref_input, ref_weight, target).logprobs",
    "vllm_importance_sampling_cap": "give the objective correction=Correction(high=...), and pass sampler_logprobs",
    "vllm_importance_sampling_mode": "give the objective correction=Correction(...), and pass sampler_logprobs",
    "logits_scaling": "pass logit_scale=1 / logits_scaling",
    "accum_dtype": "gradients are summed in fp32 whatever the inputs: leave it out",
    "compiled": "call it in a function under torch.compile",
    "use_token_scaling": "call linear_loss with dft()",
    "return_token_accuracy": "call linear_loss with extras=Extras(argmax=True)",
    "return_z_loss": "it is z_loss times the mean square of linear_logprobs(...).logsumexp",
    "shift": "pass hidden[:, :-1] and target[:, 1:]",
    "filter_eps": "pass plan=Plan(filter=Filter(...)), which bounds the error",
}
ADVICE |= dict.fromkeys(("ref_weight", "ref_bias"), ADVICE["ref_input"])
ADVICE |= dict.fromkeys(("completion_mask", "loss_mask", "response_mask", "mask"), ADVICE["attention_mask"])


def meant(name: str, known: Collection[str]) -> str:
    """What to write instead of an unknown option, as the end of a sentence; empty where nobody can tell."""
    if ours := [word for word, theirs in WORDS.items() if word in known and name in theirs.split()]:
        return f": here it is {' and '.join(ours)}"
    if name in ADVICE:
        return f": {ADVICE[name]}"
    near = difflib.get_close_matches(name, [word for word in known if word[0] != "_"], n=1, cutoff=0.75)
    return f": did you mean {near[0]}?" if near else ""


def explained(owner: str, error: TypeError, passed: Collection[str], known: Collection[str]) -> TypeError:
    """Python's own error, or where an option is unknown one that says which is meant."""
    unknown = [name for name in passed if name not in known]
    return TypeError(f"{owner} has no option {unknown[0]}{meant(unknown[0], known)}") if unknown else error
