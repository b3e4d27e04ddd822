"""How well does a model forget? Real data, real retrained models, and the methods side by side.

- what is forgotten: `data/`, `tasks`, `networks`, `training`, `setups`, `originals` (trained networks, kept in a cache)
- by whom: `methods/`, a file for each; `problem` is what a method is given, `layers` what some of them share
- how it is measured: `execute` (one run and its costs), `measures`
- commands: `tune` writes tuned.json, `run` appends to runs.jsonl, `page` makes tables, pictures and results.json of it
- what the page says: `store`, `summary`, `claims`, `tables`, `pictures`
- beside it: `projections`, what any projection can do for rows; `forecasts`, how well a retrained network is foretold
"""
