"""Making the embedded models: trainers, and the calibration samples they come with. Not shipped."""
