#!/bin/sh
# Start one real Apache Kafka in KRaft mode, which is broker and controller: start.sh JARS FOLDER PORT CONTROLLER_PORT.
# What it keeps in FOLDER is there again at the next start. A shell replaced by Java, so that signals reach it.
set -eu
jars=$1 folder=$2 port=$3 controller=$4
mkdir -p "$folder"
cat >"$folder/server.properties" <<PROPERTIES
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:$controller
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$controller
advertised.listeners=PLAINTEXT://127.0.0.1:$port
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=$folder/logs
num.partitions=2
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
PROPERTIES
java -Dorg.slf4j.simpleLogger.defaultLogLevel=warn -cp "$jars/*" kafka.tools.StorageTool \
    format --standalone --ignore-formatted -t ZnJhdWQtYmVudG8ta2Fma2E -c "$folder/server.properties" >/dev/null
exec java -Dorg.slf4j.simpleLogger.defaultLogLevel=warn -Xmx512m -XX:+UseSerialGC -cp "$jars/*" \
    kafka.Kafka "$folder/server.properties"
