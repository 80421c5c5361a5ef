"""Pipeline schedules, GPipe and 1F1B: in which order a stage does its forwards and backwards.

A schedule is a generator of actions ("forward" or "backward", micro-batch) for each stage. GPipe
(Huang et al. 2018, arXiv:1811.06965) does all forwards, then all backwards. 1F1B (Narayanan et al.
2021, arXiv:2104.04473, Sec. 2.2) begins to go back as soon as it can: the same bubble, but fewer
micro-batches in flight. The simulator lays a schedule on a clock. A forward takes one unit of time,
a backward two.
"""

from utils import run


def gpipe(stage, stages, micro):
    """All forwards, then all backwards. GPipe, Fig. 2c."""
    for i in range(micro):
        yield "forward", i
    for i in reversed(range(micro)):
        yield "backward", i


def one_f_one_b(stage, stages, micro):
    """A forward for each stage behind this one, then one forward, one backward in turn.

    Narayanan et al., Fig. 4.
    """
    # Warm-up: until the first micro-batch has come to the last stage.
    warm = min(stages - 1 - stage, micro)
    for i in range(warm):
        yield "forward", i
    # Steady state: as many micro-batches stay in flight.
    for i in range(warm, micro):
        yield "forward", i
        yield "backward", i - warm
    # Cool-down: those that are still in flight.
    for i in range(micro - warm, micro):
        yield "backward", i


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b}
UNITS = {"forward": 1, "backward": 2}  # time: twice as many products


def bubble(stages, micro):
    """The fraction of its time that a rank waits, if all stages are equally fast.

    GPipe, Sec. 2.3.
    """
    return (stages - 1) / (micro + stages - 1)


def max_in_flight(actions):
    """In-flight micro-batches at the most: m in GPipe, p - stage in 1F1B.

    In flight is a micro-batch whose forward is done and whose backward is not yet.
    """
    in_flight = 0
    most = 0
    for kind, _ in actions:
        if kind == "forward":
            in_flight += 1
        else:
            in_flight -= 1
        most = max(most, in_flight)
    return most


def simulate(schedule, stages, micro, seconds=None):
    """When everything happens, if actions wait for nothing but their inputs and their rank.

    seconds: {(stage, kind, micro-batch): how long it takes}; None: 1 forward, 2 backward ->
    [[(kind, micro-batch, begin, end)] by rank]. Raises UserError if ranks wait for each other for
    ever.
    """
    todo = [list(schedule(stage, stages, micro)) for stage in range(stages)]
    timelines = [[] for _ in range(stages)]
    done = {}  # (stage, kind, micro-batch): end
    while any(todo):
        left = sum(len(queue) for queue in todo)
        for stage, queue in enumerate(todo):
            # Each stage goes on as far as it has its inputs.
            while queue:
                kind, i = queue[0]
                # Activations come from the stage before, gradients from the stage behind.
                sender = stage - 1 if kind == "forward" else stage + 1
                if 0 <= sender < stages and (sender, kind, i) not in done:
                    break
                # It begins when its input is there and the rank is free.
                received = done.get((sender, kind, i), 0)
                free = timelines[stage][-1][3] if timelines[stage] else 0
                begin = max(received, free)
                end = begin + (seconds[stage, kind, i] if seconds else UNITS[kind])
                done[stage, kind, i] = end
                timelines[stage].append((kind, i, begin, end))
                queue.pop(0)
        run.check(
            sum(len(queue) for queue in todo) < left,
            f"in {schedule.__name__} the ranks wait for each other for ever",
        )
    return timelines


def idle_fraction(timelines):
    """The fraction of the time between first begin and last end in which ranks wait, their mean."""
    begin = min(line[0][2] for line in timelines)
    end = max(line[-1][3] for line in timelines)
    busy = 0
    for line in timelines:
        busy += sum(action_end - action_begin for _, _, action_begin, action_end in line)
    return 1 - busy / ((end - begin) * len(timelines))
