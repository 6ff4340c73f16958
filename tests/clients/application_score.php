<?php
// A client of the contract application-score as a PHP backend has it: curl, 5 s for a score, 2 s for the health check.

declare(strict_types=1);

final class ScoringClient
{
    public function __construct(private string $baseUrl, private int $timeout = 5)
    {
    }

    public function score(array $features, ?string $requestId = null): array
    {
        $answer = $this->call('POST', '/api/v1/score', $this->timeout, [
            'features' => $features,
            'request_id' => $requestId,
        ]);
        if ($answer['status'] !== 200) {
            throw new RuntimeException("{$answer['status']}: {$answer['body']}");
        }
        return json_decode($answer['body'], true, 512, JSON_THROW_ON_ERROR);
    }

    public function isHealthy(): bool
    {
        return $this->call('GET', '/health', 2)['status'] === 200;
    }

    public function modelInfo(): array
    {
        return json_decode($this->call('GET', '/api/v1/model/info', 5)['body'], true, 512, JSON_THROW_ON_ERROR);
    }

    private function call(string $method, string $path, int $timeout, ?array $body = null): array
    {
        $handle = curl_init($this->baseUrl . $path);
        curl_setopt_array($handle, [
            CURLOPT_CUSTOMREQUEST => $method,
            CURLOPT_RETURNTRANSFER => true,
            CURLOPT_TIMEOUT => $timeout,
            CURLOPT_PROXY => '',
        ]);
        if ($body !== null) {
            curl_setopt($handle, CURLOPT_POSTFIELDS, json_encode($body, JSON_THROW_ON_ERROR));
            curl_setopt($handle, CURLOPT_HTTPHEADER, ['Content-Type: application/json', 'Accept: application/json']);
        }
        $answered = curl_exec($handle);
        if ($answered === false) {
            throw new RuntimeException(curl_error($handle));
        }
        return ['status' => curl_getinfo($handle, CURLINFO_RESPONSE_CODE), 'body' => $answered];
    }
}

$client = new ScoringClient($argv[1]);
$rows = json_decode($argv[2], true, 512, JSON_THROW_ON_ERROR);
$refused = '';
try {
    $client->score([]);
} catch (RuntimeException $error) {
    $refused = $error->getMessage();
}
echo json_encode([
    'healthy' => $client->isHealthy(),
    'scores' => array_map(fn (array $row): array => $client->score($row, 'php-1'), $rows),
    'info' => $client->modelInfo(),
    'refused' => $refused,
], JSON_THROW_ON_ERROR | JSON_PRESERVE_ZERO_FRACTION);
