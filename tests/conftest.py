"""Settings for every test: no network, no login, one thread, so that several processes fit on two cores."""

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", OMP_NUM_THREADS="1")
