"""What would the service's main route be in Flask? The same functions behind it, for tests/benchmarks/serving.py.

gunicorn --workers 1 --worker-class gthread --threads 4 tests.benchmarks.flask_route:app
"""

from typing import Any

from flask import Flask, jsonify, request

from llmtrain.serve.asked import read_rates
from llmtrain.serve.configs import planned
from llmtrain.serve.refusals import Refusal

app = Flask(__name__)


@app.post("/lr_schedule")
def lr_schedule() -> Any:
    """One learning rate."""
    try:
        config, _, step, setting = read_rates(request.get_json())
        schedule, digest = planned(config, setting)
    except Refusal as refusal:
        return jsonify(errors=[problem.model_dump() for problem in refusal.problems]), refusal.status
    return jsonify(learning_rate=schedule.lr(step), step=step, hash=digest)
