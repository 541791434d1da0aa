"""How much may one client ask of the service?

Every answer is bounded before it is computed: in bytes read, in values looked at, in updates evaluated, in seconds.
"""

BODY_BYTES = 256 * 1024
HEAD_BYTES = 64 * 1024  # of a request line with its headers
REQUEST_BYTES = 2 * 1024 * 1024  # as they come over the wire; a chunked body is longer than its content
JSON_DEPTH = 16
TEXT_CHARACTERS = 100  # of a string or a key in a config
LIST_ITEMS = 10_000  # of a config's list
COUNT = 200  # of a parameter that counts, such as cycles
PIECES = 100  # of a chain
LARGEST = 2**53  # update numbers and tokens, exact in a double

POINTS = 100_000  # learning rates in one answer
COMPARED_CONFIGS = 8
COMPARED_UPDATES = 1_000_000  # evaluated for one comparison, its conventions included
CURVE_POINTS = 2_000  # of each curve in a comparison

ROWS = 10_000  # of metrics in one answer
ROWS_BYTES = 2 * 1024 * 1024
CONFIG_BYTES = 1024 * 1024  # of a run's config.yaml
RUNS = 1_000  # in one listing

REQUEST_SECONDS = 10.0  # to receive a request, to answer it, to read the answer
KEEP_ALIVE_SECONDS = 15
DRAIN_SECONDS = 1.0  # that idle connections stay open after SIGTERM
SHUTDOWN_SECONDS = 25  # until requests still in flight are cancelled
CONNECTIONS = 4_096  # of one worker
SLOTS = 16  # large requests at once, until their answers are sent, in one worker
SMALL_BYTES = 4 * 1024  # a larger body, or more points than SMALL_POINTS, makes a request large
SMALL_POINTS = 256
CACHED_SCHEDULES = 1_024
