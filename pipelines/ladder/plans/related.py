"""The rows of docs/related/plan.md: the related systems, other ways to join a frozen language model with a
generator, each beside itself without what its paper adds.

All rows share data, steps, batch, optimizer and DiT, and read plain captions.
"""

from pipelines.ladder.plans.base import Claim, Plan, Row, Step

QUERIES = {"num_queries": 16}
"""A query for each latent token; the papers' 64 and 256 are a quarter and all of theirs."""
METAQUERY = {"method": "metaquery", **QUERIES, "connector_depth": 4}
BLIP3O = {"method": "blip3o", **QUERIES}
LI_DIT = {"method": "li_dit", "instruction": "describe the image"}
"""The instruction is the one under which the language model learned to caption."""
GILL = {"method": "gill", "num_queries": 24, "width": 128}
CONTROLLER = {"method": "llm_controller", "trains_generator": True}
"""No text-conditioned DiT lies ready here, so that the rows train it beside what is added."""

LISTED = (
    Row("metaquery", "MetaQuery", "llava", METAQUERY),
    Row(
        "metaquery_bare",
        "MetaQuery without connector",
        "llava",
        {**METAQUERY, "connector_depth": 0},
    ),
    Row("blip3o", "BLIP3-o", "llava", BLIP3O),
    Row("blip3o_vae", "BLIP3-o, VAE", "llava", BLIP3O, space="vae"),
    Row("li_dit", "LI-DiT", "llava", LI_DIT),
    Row("li_dit_bare", "LI-DiT without refiner", "llava", {**LI_DIT, "refiner_depth": 0}),
    Row("li_dit_uninstructed", "LI-DiT without instruction", "llava", {**LI_DIT, "instruction": ""}),
    Row("li_dit_two", "LI-DiT, two language models", "llava", LI_DIT, second="language"),
    Row("gill", "GILL", "llava", GILL, second="language"),
    Row("gill_text_encoder", "GILL's text encoder itself", "language", {"method": "text_embed"}),
    Row("llm_controller", "LLM controller", "llava", CONTROLLER, second="language"),
    Row(
        "llm_controller_whole",
        "LLM controller, whole updates",
        "llava",
        {**CONTROLLER, "subtracts_alone": False},
        second="language",
    ),
)

LADDERS = {
    "MetaQuery": (
        Step("metaquery_bare", "queries and a projection"),
        Step("metaquery", "+ bidirectional connector", "metaquery_bare"),
    ),
    "BLIP3-o": (
        Step("blip3o_vae", "queries, VAE"),
        Step("blip3o", "+ vision features", "blip3o_vae"),
    ),
    "LI-DiT": (
        Step("li_dit_bare", "instructed states of the third-to-last layer"),
        Step("li_dit", "+ refiner", "li_dit_bare"),
        Step("li_dit_two", "+ a second language model", "li_dit"),
    ),
    "LLM controller": (
        Step("llm_controller_whole", "a text encoder and summed updates of a language model"),
        Step("llm_controller", "+ less those of the token alone", "llm_controller_whole"),
    ),
}

CLAIMS = (
    Claim("a bidirectional connector helps the queries", ("metaquery", "metaquery_bare")),
    Claim("vision features beat VAE latents behind queries", ("blip3o", "blip3o_vae")),
    Claim("a gated refiner helps", ("li_dit", "li_dit_bare")),
    Claim("an instruction before the prompt helps", ("li_dit", "li_dit_uninstructed")),
    Claim("a second language model helps", ("li_dit_two", "li_dit")),
    Claim("a language model beside the text encoder helps", ("llm_controller", "gill_text_encoder")),
)

DESCRIBED = (
    Claim("a text encoder beats what GILL maps to it", ("gill_text_encoder", "gill")),
    Claim("MetaQuery beats BLIP3-o", ("metaquery", "blip3o")),
    Claim("an instructed reading beats queries", ("li_dit", "metaquery")),
    Claim("what context adds beats whole updates", ("llm_controller", "llm_controller_whole")),
)

RELATED = Plan(
    title="The related systems",
    about=(
        "Other ways to join a frozen language model with a generator, on the embedded world: matched data, "
        "steps and DiT, each system beside itself without what its paper adds. [The plan](related/plan.md) "
        "was written before any run. Made by `make related` from the result files"
    ),
    command="make related",
    listed=LISTED,
    ladders=LADDERS,
    claims=CLAIMS,
    described=DESCRIBED,
)
