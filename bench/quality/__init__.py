"""How well does a model forget? Real data, real retrained models, and the methods side by side."""
