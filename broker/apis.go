package broker

// The API keys that are served.
const (
	keyProduce              int16 = 0
	keyFetch                int16 = 1
	keyListOffsets          int16 = 2
	keyMetadata             int16 = 3
	keyOffsetCommit         int16 = 8
	keyOffsetFetch          int16 = 9
	keyFindCoordinator      int16 = 10
	keyJoinGroup            int16 = 11
	keyHeartbeat            int16 = 12
	keyLeaveGroup           int16 = 13
	keySyncGroup            int16 = 14
	keyDescribeGroups       int16 = 15
	keyListGroups           int16 = 16
	keyAPIVersions          int16 = 18
	keyCreateTopics         int16 = 19
	keyDeleteTopics         int16 = 20
	keyDeleteRecords        int16 = 21
	keyInitProducerID       int16 = 22
	keyOffsetForLeaderEpoch int16 = 23
	keyDescribeConfigs      int16 = 32
	keyCreatePartitions     int16 = 37
	keyDeleteGroups         int16 = 42
	keyIncrementalAlter     int16 = 44
	keyDescribeCluster      int16 = 60
	keyDescribeTopicParts   int16 = 75
)

// api is one API key. handle decodes the body and answers, at once or later; an error closes the connection.
type api struct {
	key      int16
	name     string
	min, max int16 // as advertised
	least    int16 // the lowest that is really served, if above min
	flex     int16 // first flexible version
	handle   func(*request) error
}

func (a *api) served() int16 { return max(a.min, a.least) }

// apiTable is what ApiVersions advertises. A maximum is raised only when that version is wholly implemented. Produce is advertised from 0 although 0-2
// are refused: librdkafka takes a higher minimum for "no compression" (KAFKA-18659).
func apiList() []api {
	return []api{
		{keyProduce, "Produce", 0, 11, 3, 9, handleProduce},
		{keyFetch, "Fetch", 4, 16, 0, 12, handleFetch},
		{keyListOffsets, "ListOffsets", 1, 10, 0, 6, handleListOffsets},
		{keyMetadata, "Metadata", 0, 12, 0, 9, handleMetadata},
		{keyOffsetCommit, "OffsetCommit", 1, 9, 0, 8, handleOffsetCommit},
		{keyOffsetFetch, "OffsetFetch", 1, 9, 0, 6, handleOffsetFetch},
		{keyFindCoordinator, "FindCoordinator", 0, 4, 0, 3, handleFindCoordinator},
		{keyJoinGroup, "JoinGroup", 0, 9, 0, 6, handleJoinGroup},
		{keyHeartbeat, "Heartbeat", 0, 4, 0, 4, handleHeartbeat},
		{keyLeaveGroup, "LeaveGroup", 0, 5, 0, 4, handleLeaveGroup},
		{keySyncGroup, "SyncGroup", 0, 5, 0, 4, handleSyncGroup},
		{keyDescribeGroups, "DescribeGroups", 0, 6, 0, 5, handleDescribeGroups},
		{keyListGroups, "ListGroups", 0, 5, 0, 3, handleListGroups},
		{keyAPIVersions, "ApiVersions", 0, 4, 0, 3, handleAPIVersions},
		{keyCreateTopics, "CreateTopics", 0, 7, 0, 5, handleCreateTopics},
		{keyDeleteTopics, "DeleteTopics", 0, 6, 0, 4, handleDeleteTopics},
		{keyDeleteRecords, "DeleteRecords", 0, 2, 0, 2, handleDeleteRecords},
		{keyInitProducerID, "InitProducerId", 0, 4, 0, 2, handleInitProducerID},
		{keyOffsetForLeaderEpoch, "OffsetForLeaderEpoch", 2, 4, 0, 4, handleOffsetForLeaderEpoch},
		{keyDescribeConfigs, "DescribeConfigs", 0, 4, 0, 4, handleDescribeConfigs},
		{keyCreatePartitions, "CreatePartitions", 0, 3, 0, 2, handleCreatePartitions},
		{keyDeleteGroups, "DeleteGroups", 0, 2, 0, 2, handleDeleteGroups},
		{keyIncrementalAlter, "IncrementalAlterConfigs", 0, 1, 0, 1, handleIncrementalAlterConfigs},
		{keyDescribeCluster, "DescribeCluster", 0, 2, 0, 0, handleDescribeCluster},
		{keyDescribeTopicParts, "DescribeTopicPartitions", 0, 0, 0, 0, handleDescribeTopicPartitions},
	}
}

// APIVersion is a range of versions that is served.
type APIVersion struct {
	Name     string
	Min, Max int16
}

// APIs lists what is served, by key.
func APIs() (out []APIVersion) {
	for _, a := range apiList() {
		out = append(out, APIVersion{a.name, a.served(), a.max})
	}
	return out
}
