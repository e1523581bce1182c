"""A Python client: kafka-python or confluent-kafka. produce takes lines from stdin, consume prints them; against several voters stream prints a line for each acknowledgement
and group consumes until it has seen --count values, committing often."""
import argparse
import sys
import threading

p = argparse.ArgumentParser()
p.add_argument("op", choices=["produce", "consume", "stream", "group"])
p.add_argument("lib", choices=["kafka-python", "confluent-kafka"])
p.add_argument("--bootstrap")
p.add_argument("--topic")
p.add_argument("--codec", default="none")
p.add_argument("--group")
p.add_argument("--count", type=int)
a = p.parse_args()
codec = None if a.codec == "none" else a.codec
lines = [l.rstrip("\n").encode() for l in sys.stdin] if a.op == "produce" else []
out = sys.stdout.buffer


def acked():
    out.write(b"acked\n")
    out.flush()


def gather(poll, commit):
    seen = set()
    while len(seen) < a.count:
        values = poll()
        for v in values:
            seen.add(v)
            out.write(v + b"\n")
        out.flush()
        if values:
            commit()


if a.lib == "kafka-python":
    from kafka import KafkaConsumer, KafkaProducer, TopicPartition

    if a.op == "stream":
        failed = []
        k = KafkaProducer(bootstrap_servers=a.bootstrap, acks="all", enable_idempotence=True)
        for l in iter(sys.stdin.buffer.readline, b""):
            k.send(a.topic, l.rstrip(b"\n")).add_callback(lambda _: acked()).add_errback(failed.append)
        k.flush()
        k.close()
        if failed:
            sys.exit("not delivered: %s" % failed[:3])
    elif a.op == "group":
        k = KafkaConsumer(a.topic, bootstrap_servers=a.bootstrap, group_id=a.group, enable_auto_commit=False, auto_offset_reset="earliest")
        gather(lambda: [r.value for rs in k.poll(500, max_records=100).values() for r in rs], k.commit)
        k.close()
    elif a.op == "produce":
        k = KafkaProducer(bootstrap_servers=a.bootstrap, compression_type=codec, acks="all")
        sent = [k.send(a.topic, l) for l in lines]
        k.flush()
        for f in sent:
            f.get(timeout=20)
        k.close()
    else:
        k = KafkaConsumer(bootstrap_servers=a.bootstrap, group_id=a.group, enable_auto_commit=False, auto_offset_reset="earliest", consumer_timeout_ms=20000)
        if a.group:
            k.subscribe([a.topic])
        else:
            k.assign([TopicPartition(a.topic, 0)])
            k.seek_to_beginning()
        n = 0
        for r in k:
            out.write(r.value + b"\n")
            n += 1
            if n == a.count:
                break
        if a.group:
            k.commit()
        k.close()
else:
    from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

    if a.op == "stream":
        failed = []
        k = Producer({"bootstrap.servers": a.bootstrap, "enable.idempotence": True})
        ended = threading.Event()

        def deliver():
            while not ended.is_set():
                k.poll(0.1)

        t = threading.Thread(target=deliver)
        t.start()
        for l in iter(sys.stdin.buffer.readline, b""):
            k.produce(a.topic, l.rstrip(b"\n"), on_delivery=lambda err, _: failed.append(err) if err else acked())
        left = k.flush(60)
        ended.set()
        t.join()
        if left or failed:
            sys.exit("not delivered: %s" % failed[:3])
    elif a.op == "group":
        k = Consumer({"bootstrap.servers": a.bootstrap, "group.id": a.group, "enable.auto.commit": False, "auto.offset.reset": "earliest"})
        k.subscribe([a.topic])

        def poll():
            ms = k.consume(100, 0.5)
            for m in ms:
                if m.error() and not m.error().retriable():
                    raise KafkaException(m.error())
            return [m.value() for m in ms if not m.error()]

        gather(poll, lambda: k.commit(asynchronous=False))
        k.close()
    elif a.op == "produce":
        failed = []
        k = Producer({"bootstrap.servers": a.bootstrap, "compression.type": a.codec, "enable.idempotence": True})
        for l in lines:
            k.produce(a.topic, l, on_delivery=lambda err, _: failed.append(err) if err else None)
            k.poll(0)
        if k.flush(20) or failed:
            sys.exit("not delivered: %s" % failed[:3])
    else:
        k = Consumer({"bootstrap.servers": a.bootstrap, "group.id": a.group or "none", "enable.auto.commit": False, "auto.offset.reset": "earliest"})
        if a.group:
            k.subscribe([a.topic])
        else:
            k.assign([TopicPartition(a.topic, 0, 0)])
        n = 0
        while n < a.count:
            m = k.poll(20)
            if m is None or m.error():
                sys.exit("after %d records: %s" % (n, m and m.error()))
            out.write(m.value() + b"\n")
            n += 1
        if a.group:
            k.commit(asynchronous=False)
        k.close()
