"""The plan of an encode: which samples there will be, in which shard, and what is still valid.

The life of a shard:

    planned         a line of plan.jsonl: its samples in order, and for the latents and for the
       |            text of each whether they are copied from an old shard or encoded
       v
    being written   X.tar.HOST.PID.partial, by the process that has claimed it, or by the
       |            main one where that is lost
       v
    finished        X.tar has its name, then X.index: the index marks the shard, so a tar without
       |            one does not count
       v
    retired         moved to replaced/, because some of its samples changed; the new shards copy
       |            what is still valid from there
       v
    deleted         once the manifest of the new shards is written

A kill at any point leaves a state from which the same command ends with the same bytes: what is
planned is read from plan.jsonl, finished shards are skipped, retired ones are still copied from.
Writing a shard twice is harmless, because the bytes are equal. Nothing is retired before the plan
is written, and no plan is written that would remove more than it may (``removals.py``).
"""
