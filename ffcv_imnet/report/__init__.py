"""The page that `report` writes: what runs have in common, charts, evaluated checkpoints, HTML."""
