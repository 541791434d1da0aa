"""Train one run, under any launcher; rank and world size are found from the environment.

    deepspeed --num_gpus 8 launch/pretrain.py --config configs/7b_cosine.yaml
    torchrun --nproc-per-node 8 launch/pretrain.py --config configs/7b_cosine.yaml --set engine.kind=fsdp
    srun python launch/pretrain.py --config configs/7b_cosine.yaml
    python launch/pretrain.py --config configs/demo_cosine.yaml --set engine.kind=single

The same as `llmtrain train`; its --help shows the options.
"""

import sys

from llmtrain.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
