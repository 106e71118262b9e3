"""The rows of docs/ladder/plan.md: what each trains, with how many seeds, its GenEval in RepFusion's paper
(arXiv 2606.14700); the plan's six tests.

All rows share data, steps, batch, optimizer and, unless a row says otherwise, the DiT.
"""

from pipelines.ladder.plans.base import Claim, Plan, Row, Step

NOISY = {"method": "noisy_latents"}
BIDIRECTIONAL = {**NOISY, "bidirectional": True}
CROSS = {**NOISY, "interface": "cross_attention"}
TUNED = {**BIDIRECTIONAL, "train_llm": True, "captioning": {}}
TRANSFUSION = {"method": "transfusion"}
STATIC = {"method": "queries"}
TIMED = {"method": "queries", "reads_time": True}
CONNECTED = {"method": "queries", "connector_depth": 2}
TEXT = {"method": "text_embed"}
REREAD = "queries read at every step"
TRAINED = "LLM trained"
MARGIN = 0.03
"""Within this of a row, another counts as no better."""

LISTED = (
    Row("repfusion", "RepFusion", "llava", NOISY, 5, paper=0.70),
    Row("static_queries", "static queries", "llava", STATIC, 5, paper=0.55),
    Row("timestep_queries", REREAD, "llava", TIMED, 5, paper=0.54),
    Row("text_embed", "TextEmbed", "llava", TEXT),
    Row("repfusion_noise_taught", "RepFusion, noise-taught", "llava_noise_taught", NOISY, 5),
    Row("static_queries_noise_taught", "static queries, noise-taught", "llava_noise_taught", STATIC, 5),
    Row("timestep_queries_noise_taught", f"{REREAD}, noise-taught", "llava_noise_taught", TIMED),
    Row("text_embed_noise_taught", "TextEmbed, noise-taught", "llava_noise_taught", TEXT),
    Row("repfusion_language", "noisy latents, language-only LLM", "language", NOISY, 5, paper=0.64),
    Row("static_queries_language", "static queries, language-only LLM", "language", STATIC, 5),
    Row("timestep_queries_language", f"{REREAD}, language-only LLM", "language", TIMED),
    Row("text_embed_language", "TextEmbed, language-only LLM", "language", TEXT),
    Row("repfusion_bidirectional", "RepFusion, bidirectional", "llava", BIDIRECTIONAL),
    Row(
        "repfusion_noise_taught_bidirectional",
        "RepFusion, noise-taught, bidirectional",
        "llava_noise_taught",
        BIDIRECTIONAL,
        5,
    ),
    Row("repfusion_tuned", f"RepFusion, {TRAINED}", "llava", TUNED, paper=0.68),
    Row(
        "repfusion_language_tuned",
        f"noisy latents, language-only {TRAINED}",
        "language",
        TUNED,
        paper=0.65,
    ),
    Row("text_embed_vae", "TextEmbed, VAE", "language", TEXT, space="vae", paper=0.47),
    Row("repfusion_vae", "noisy latents, VAE", "language", NOISY, space="vae", paper=0.54),
    Row("static_queries_wide", "static queries, larger DiT", "llava", STATIC, same_flops_as="repfusion"),
    Row(
        "text_embed_wide",
        "TextEmbed, larger DiT",
        "llava",
        TEXT,
        paper=0.66,
        same_flops_as="repfusion",
    ),
    Row("repfusion_large", "RepFusion, larger MLLM", "llava_large", NOISY),
    Row("static_queries_large", "static queries, larger MLLM", "llava_large", STATIC),
    Row("repfusion_cross", "RepFusion, cross-attention", "llava", CROSS, paper=0.69),
    Row("connected_queries", "static queries, bidirectional connector", "llava", CONNECTED),
    Row("transfusion_vae", "Transfusion, VAE", "language", TRANSFUSION, space="vae", paper=0.56),
    Row("transfusion_language", "Transfusion, language-only LLM", "language", TRANSFUSION, paper=0.54),
    Row("transfusion", "Transfusion", "llava", TRANSFUSION, paper=0.62),
    Row("transfusion_large", "Transfusion, larger MLLM", "llava_large", TRANSFUSION, paper=0.64),
)

LADDERS = {
    "From TextEmbed": (
        Step("text_embed_vae", "TextEmbed, VAE"),
        Step("repfusion_vae", "+ noisy latents into the LLM", "text_embed_vae"),
        Step("repfusion_language", "+ RAE", "repfusion_vae"),
        Step("repfusion_language_tuned", "+ train the LLM", "repfusion_language"),
        Step("repfusion_tuned", "+ perception pretraining", "repfusion_language_tuned"),
        Step("repfusion", "back to a frozen LLM = RepFusion", "repfusion_tuned"),
    ),
    "From Transfusion": (
        Step("transfusion_vae", "Transfusion, VAE"),
        Step("transfusion_language", "+ RAE", "transfusion_vae"),
        Step("transfusion", "+ perception pretraining", "transfusion_language"),
        Step("transfusion_large", "+ larger LLM", "transfusion", adopted=False),
        Step("repfusion_tuned", "+ LLM as conditional encoder", "transfusion"),
        Step("repfusion", "+ freeze the LLM = RepFusion", "repfusion_tuned"),
    ),
}

CLAIMS = (
    Claim("a frozen MLLM that reads the noisy latents beats static queries", ("repfusion", "static_queries")),
    Claim(
        "so does one that perceives noised latents",
        ("repfusion_noise_taught", "static_queries_noise_taught"),
    ),
    Claim(
        "perceiving noised latents adds to what reading them gains",
        ("repfusion_noise_taught", "static_queries_noise_taught", "repfusion", "static_queries"),
    ),
    Claim("perception pretraining helps a frozen LLM", ("repfusion", "repfusion_language")),
    Claim("so does perceiving noised latents beside clean ones", ("repfusion_noise_taught", "repfusion")),
    Claim(
        f"queries read again at every step are no better, by {MARGIN:g}",
        ("timestep_queries", "static_queries"),
        MARGIN,
    ),
)

DESCRIBED = (
    Claim(
        "a language-only LLM that reads the noisy latents beats its static queries",
        ("repfusion_language", "static_queries_language"),
    ),
    Claim("RepFusion beats static queries of the same FLOPs", ("repfusion", "static_queries_wide")),
    Claim("RepFusion beats TextEmbed of the same FLOPs", ("repfusion", "text_embed_wide")),
    Claim("a language-only LLM prefers to be tuned", ("repfusion_language_tuned", "repfusion_language")),
    Claim("an MLLM prefers to stay frozen", ("repfusion", "repfusion_tuned")),
    Claim(
        "tuning helps a language-only LLM more than an MLLM",
        ("repfusion_language_tuned", "repfusion_language", "repfusion_tuned", "repfusion"),
    ),
    Claim("RAE beats VAE for a static text condition", ("text_embed_language", "text_embed_vae")),
)

REPFUSION = Plan(
    title="The ladder",
    about=(
        "RepFusion's comparisons (arXiv 2606.14700) on the embedded world: matched data, steps and DiT. "
        "Made by `python -m pipelines.ladder table` from the result files"
    ),
    command="make ladder",
    listed=LISTED,
    ladders=LADDERS,
    claims=CLAIMS,
    described=DESCRIBED,
    charts={
        "Static conditions": (
            "repfusion",
            "timestep_queries",
            "static_queries",
            "text_embed",
            "text_embed_vae",
        )
    },
    sampled_again=(
        "repfusion",
        "static_queries",
        "timestep_queries",
        "repfusion_large",
        "static_queries_large",
    ),
)
