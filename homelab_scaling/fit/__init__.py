"""Laws, engine and resampling; numpy and scipy only."""
