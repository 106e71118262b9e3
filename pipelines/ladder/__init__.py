"""RepFusion's controlled comparisons on the embedded world: rows x seeds -> results -> tables."""
