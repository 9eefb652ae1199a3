"""From arrays to a model one can serve: network, training, evaluation, calibration, gate, bundle."""
