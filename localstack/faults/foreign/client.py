"""librdkafka as a client of make faults: produce BOOTSTRAP | consume BOOTSTRAP TOPIC:PARTITION...
produce takes lines "ID TOPIC PARTITION VALUE" and prints "ID OFFSET" once it is acknowledged, offset -1 if it never will be; consume prints "TOPIC PARTITION OFFSET VALUE". Values are base64."""
import base64
import sys

from confluent_kafka import Consumer, Producer, TopicPartition

op, bootstrap = sys.argv[1:3]


def say(*words):
    print(*words, flush=True)


if op == "produce":
    k = Producer({"bootstrap.servers": bootstrap, "enable.idempotence": True, "message.timeout.ms": 0, "linger.ms": 5, "retry.backoff.ms": 50, "socket.timeout.ms": 3000})
    for line in sys.stdin:
        number, topic, partition, value = line.split()
        k.produce(topic, base64.b64decode(value), partition=int(partition),
                  on_delivery=lambda err, m, number=number: say(number, -1 if err else m.offset()))
        k.poll(0)
    k.flush(60)
else:
    k = Consumer({"bootstrap.servers": bootstrap, "group.id": "none", "enable.auto.commit": False, "auto.offset.reset": "earliest", "fetch.wait.max.ms": 200, "socket.timeout.ms": 3000})
    k.assign([TopicPartition(t, int(p), 0) for t, p in (a.split(":") for a in sys.argv[3:])])
    while True:
        m = k.poll(1)
        if m is not None and not m.error():
            say(m.topic(), m.partition(), m.offset(), base64.b64encode(m.value()).decode())
