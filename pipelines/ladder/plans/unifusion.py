"""The rows of docs/unifusion/plan.md: how layers of a frozen language model join into one condition, and
whether it rewrites the prompt first; with UniFusion's VQAScores (arXiv 2510.12789).

All rows share data, steps, batch, optimizer and DiT, and read terse prompts.
"""

from pipelines.ladder.plans.base import Claim, Plan, Row, Step

FOUR_WAYS, LATER = "four ways, Llama-3.1-8B", "InternVL-2.5-8B"
"""The paper's two set-ups, whose figures are not of one scale."""
LAYERS = {"taps": [1, 2, 3, 4]}
"""All layers of the small language model: a third of four would be one."""
LAP = {"method": "lap", "lap": LAYERS}
CHAT = {"method": "unifusion", "lap": LAYERS}
REWRITING = {"system": "rewrite", "max_new_tokens": 32}
VERIFI = {**CHAT, "rewriting": REWRITING}

LISTED = (
    Row("lap", "LAP", "llava", LAP, paper=0.685, setup=FOUR_WAYS),
    Row(
        "one_layer",
        "last layer + adaptor",
        "llava",
        {"method": "one_layer"},
        paper=0.658,
        setup=FOUR_WAYS,
    ),
    Row(
        "hidden_injection",
        "hidden-state injection",
        "llava",
        {"method": "hidden_injection"},
        paper=0.646,
        setup=FOUR_WAYS,
    ),
    Row(
        "key_values",
        "key/value concatenation",
        "llava",
        {"method": "key_values"},
        paper=0.629,
        setup=FOUR_WAYS,
    ),
    Row("unifusion", "UniFusion", "llava", CHAT, paper=0.766, setup=LATER),
    Row("unifusion_verifi", "UniFusion + VERIFI", "llava", VERIFI, paper=0.786, setup=LATER),
    Row("penultimate", "penultimate layer", "llava", {"method": "one_layer", "layer": -2}),
    Row("channel_concat", "channel concatenation", "llava", {"method": "channel_concat"}),
    Row("all_layers", "all layers", "llava", {"method": "all_layers", "interface": "in_context"}),
    Row("layer_per_block", "one layer a block", "llava", {"method": "layer_per_block"}),
    Row("lap_language", "LAP, language-only LLM", "language", LAP),
    Row(
        "unifusion_mixed",
        "UniFusion + VERIFI, half of the prompts as they are",
        "llava",
        {**CHAT, "rewriting": {**REWRITING, "share": 0.5}},
    ),
    Row("unifusion_verifi_vae", "UniFusion + VERIFI, VAE", "llava", VERIFI, space="vae"),
    Row("repfusion", "RepFusion", "llava", {"method": "noisy_latents"}),
    Row("repfusion_lap", "RepFusion + LAP", "llava", {"method": "noisy_latents", "lap": LAYERS}),
)

LADDERS = {
    "Four ways": (
        Step("key_values", "key/value concatenation"),
        Step("hidden_injection", "hidden-state injection", "key_values"),
        Step("one_layer", "last layer + adaptor", "hidden_injection"),
        Step("lap", "LAP", "one_layer"),
    ),
    "The later set-up": (
        Step("unifusion", "UniFusion: LAP of a chat"),
        Step("unifusion_verifi", "+ VERIFI", "unifusion"),
    ),
}

CLAIMS = (
    Claim("pooling layers beats the last layer with an adaptor", ("lap", "one_layer")),
    Claim("pooling layers beats injecting them a block each", ("lap", "hidden_injection")),
    Claim("pooling layers beats concatenating keys and values", ("lap", "key_values")),
    Claim("rewriting the prompt first beats the prompt as it is", ("unifusion_verifi", "unifusion")),
)

DESCRIBED = (
    Claim("the last layer beats injecting a layer a block", ("one_layer", "hidden_injection")),
    Claim(
        "injecting a layer a block beats concatenating keys and values", ("hidden_injection", "key_values")
    ),
    Claim("LAP beats the penultimate layer", ("lap", "penultimate")),
    Claim("LAP beats channel concatenation", ("lap", "channel_concat")),
    Claim("LAP beats all layers concatenated", ("lap", "all_layers")),
    Claim("LAP beats one layer a block", ("lap", "layer_per_block")),
    Claim("LAP of a model that sees beats LAP of one that never saw", ("lap", "lap_language")),
    Claim("a chat conditions better than the bare prompt", ("unifusion", "lap")),
    Claim("rewriting all of the training's prompts beats half", ("unifusion_verifi", "unifusion_mixed")),
    Claim("RAE beats VAE for UniFusion + VERIFI", ("unifusion_verifi", "unifusion_verifi_vae")),
    Claim("RepFusion gains by LAP", ("repfusion_lap", "repfusion")),
    Claim("RepFusion beats UniFusion + VERIFI", ("repfusion", "unifusion_verifi")),
)

UNIFUSION = Plan(
    title="UniFusion's comparisons",
    about=(
        "How layers of a frozen language model join into a condition, and VERIFI (arXiv 2510.12789), on the "
        "embedded world: terse prompts, matched data, steps and DiT; the paper's figures are VQAScores, ours "
        "shares of prompts followed. [The plan](unifusion/plan.md) was written before any run. Made by `make "
        "unifusion` from the result files"
    ),
    command="make unifusion",
    listed=LISTED,
    ladders=LADDERS,
    claims=CLAIMS,
    described=DESCRIBED,
    charts={"Other fusions": ("lap", "penultimate", "channel_concat", "all_layers", "layer_per_block")},
)
