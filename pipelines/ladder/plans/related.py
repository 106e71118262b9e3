"""The rows of docs/related/plan.md: the related systems, other ways to join a frozen language model with a
generator, each beside itself without what its paper adds.

All rows share data, steps, batch, optimizer and DiT, and read plain captions.
"""

from pipelines.ladder.plans.base import Claim, Plan, Row, Step

QUERIES = {"num_queries": 16}
"""As many as there are latent tokens; the papers' 64 and 256 are a quarter and all of theirs."""
METAQUERY = {"method": "metaquery", **QUERIES, "connector_depth": 4}

LISTED = (
    Row("metaquery", "MetaQuery", "llava", METAQUERY),
    Row(
        "metaquery_bare",
        "MetaQuery without connector",
        "llava",
        {**METAQUERY, "connector_depth": 0},
    ),
)

LADDERS = {
    "MetaQuery": (
        Step("metaquery_bare", "queries and a projection"),
        Step("metaquery", "+ bidirectional connector", "metaquery_bare"),
    ),
}

CLAIMS = (Claim("a bidirectional connector helps the queries", ("metaquery", "metaquery_bare")),)

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
)
